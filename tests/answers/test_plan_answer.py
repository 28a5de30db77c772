"""What mst-plan answers: first lines, what a run takes, other lengths and GPUs, settings that are written and train."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ROOT, free_port, run

from mst_ds.answers import Cost, Limit
from mst_ds.answers.verdict import cost_of_mix
from mst_ds.commands import plan as plan_command
from mst_ds.config import GIB
from mst_ds.gpus import gpu_by_name

LLAMA_8B = ("--model", "meta-llama/Llama-3.1-8B", "--num_gpus", "8", "--gpu", "H100")
HOST = ("--host_memory_gib", "1900")
Asked = Callable[..., tuple[int, str]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The command in this process: its exit code, and what it prints."""
    monkeypatch.chdir(ROOT)

    def answer(*flags: str) -> tuple[int, str]:
        code = plan_command.main(flags)
        return code, capsys.readouterr().out

    return answer


@pytest.mark.parametrize(
    ("flags", "code", "first"),
    [
        (("--seq_len", "128K"), 0, "fits; fullest is the device, "),
        (
            ("--seq_len", "8000K", *HOST),
            1,
            "does NOT fit; the limit is the host: needs 2000.0 GiB a node, 1900.0 there\n",
        ),
        (("--seq_len", "8000K"), 1, "does NOT fit; the limit is the device, loss: needs "),
    ],
)
def test_the_first_line_names_the_limit(ask: Asked, flags: tuple[str, ...], code: int, first: str) -> None:
    found, text = ask(*LLAMA_8B, *flags)
    assert (found, text[: len(first)]) == (code, first)


def test_a_host_of_which_nothing_is_known_is_hinted_at(ask: Asked) -> None:
    hint = "nothing is known of the host: with --host_memory_gib activations may lie there, which is longer or faster"
    text = ask("--model", "Qwen/Qwen3-8B", "--num_gpus", "8", "--gpu", "H100", "--seq_len", "1M")[1]
    assert hint in text.splitlines()
    assert "\n  host_memory_gib 5" in text
    assert hint not in ask(*LLAMA_8B, *HOST, "--seq_len", "1M")[1]


def test_a_limit_that_is_missed_by_little_does_not_read_as_if_it_were_met() -> None:
    limit = Limit("device", "loss", 79 * GIB + 2**20, 79 * GIB)
    assert str(limit) == "device, loss: needs 79.000977 GiB, 79.000000 there"
    assert str(Limit("device", "loss", GIB // 32, 8 * GIB)) == "device, loss: needs 0.031 GiB, 8.000 there"


def test_what_a_run_takes() -> None:
    """3600 tokens/s are 10^9 tokens in 77.16 hours; a mix takes the time of its parts."""
    cost = Cost(tokens=10**9, tokens_per_second=3600.0, gpus=8, price_per_gpu_hour=2.5)
    assert cost.hours == pytest.approx(10**9 / 3600 / 3600, rel=1e-15)
    assert str(cost) == "1,000,000,000 tokens: 77.2 hours, 617.3 GPU-hours, price 1,543.21"
    small = Cost(tokens=10**6, tokens_per_second=3600.0, gpus=8)
    assert str(small) == "1,000,000 tokens: 0.077 hours, 0.62 GPU-hours"
    slower = Cost(tokens=10**9, tokens_per_second=400.0, gpus=8, price_per_gpu_hour=2.5)
    mix = cost_of_mix([cost, slower], [0.9, 0.1], 10**9)
    assert mix.hours == pytest.approx(0.9 * cost.hours + 0.1 * slower.hours, rel=1e-15)
    assert mix.price == pytest.approx(0.9 * (cost.price or 0) + 0.1 * (slower.price or 0), rel=1e-15)


def test_the_second_line_is_the_cost(ask: Asked) -> None:
    flags = (*LLAMA_8B, *HOST, "--seq_len", "1M", "--tokens", "3e9", "--price_per_gpu_hour", "2")
    found = json.loads(ask(*flags, "--json")[1])
    cost = found["cost"]
    assert cost["tokens_per_second"] == pytest.approx(2**20 / found["predicted_step_seconds"], rel=1e-12)
    assert cost["gpu_hours"] == pytest.approx(8 * 3e9 / cost["tokens_per_second"] / 3600, rel=1e-12)
    assert cost["price"] == pytest.approx(2 * cost["gpu_hours"], rel=1e-12)
    _, second, third, *_ = ask(*flags)[1].splitlines()
    assert second.endswith(f"GPU-hours, price {cost['price']:,.2f}")
    assert third == found["trust"] == "times are predicted, to about 30%; --calibrate RUN takes them from a run"


def test_a_pair_costs_its_two_answers_and_before_them_a_forward_of_the_reference(ask: Asked) -> None:
    """Two answers of 4K compute what two sequences of a micro-batch do; without recompute, and with gate and up kept, a
    step is three forwards, and of attention a forward and 2.5 more, at 0.38 and 0.31 of the peak."""
    flags = (*LLAMA_8B, "--seq_len", "4K", "--sp_size", "8")
    pairs, text = (ask(*flags, "--objective", "dpo", *more)[1] for more in (("--json",), ()))
    found = json.loads(pairs)
    alone = json.loads(ask(*flags, "--per_device_train_batch_size", "2", "--json")[1])
    assert (found["recompute"], found["keep_mlp"], alone["reference"]) == (False, True, None)
    assert found["flops"] == alone["flops"]
    products = 2 * (32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336) + 4096 * 128256)
    attention = 4 * 32 * 4096 // 2 * 32 * 128
    once = products / 0.62 + attention / 0.38
    all_of_it = 3 * products / 0.62 + attention / 0.38 + 2.5 * attention / 0.31
    assert found["reference"]["hours"] == pytest.approx(found["cost"]["hours"] * once / all_of_it, rel=1e-9)
    assert text.splitlines()[2].startswith("before the first step the reference, where no token is read twice: 1,000,")


def test_several_lengths_are_a_row_each_and_a_list(ask: Asked) -> None:
    lengths = ("--seq_len", "8K", "8000K")
    code, text = ask(*LLAMA_8B, *lengths)
    rows = [line.split()[:3] for line in text.splitlines() if line[:8].strip().isdigit()]
    assert (code, rows) == (1, [["8192", "yes", "device"], ["8192000", "no", "device"]])
    found = json.loads(ask(*LLAMA_8B, *lengths, "--json")[1])
    assert [(answer["seq_len"], answer["fits"]) for answer in found] == [(8192, True), (8192000, False)]
    mix = json.loads(ask(*LLAMA_8B, "--seq_len", "8K:0.75", "128K:0.25", "--json")[1])
    paces = [length["cost"]["tokens_per_second"] for length in mix["lengths"]]
    assert mix["cost"]["tokens_per_second"] == pytest.approx(1 / (0.75 / paces[0] + 0.25 / paces[1]), rel=1e-12)


def test_a_comparison_has_what_fits_first_then_what_is_fast(ask: Asked, tmp_path: Path) -> None:
    flags = ("--model", "meta-llama/Llama-3.2-1B", "--num_gpus", "2", "--gpu", "A10G", "--seq_len", "64K", "--compare")
    rows = json.loads(ask(*flags, "--json")[1])
    keys = [(not row["fits"], -row["tokens_per_second"]) for row in rows]
    assert keys == sorted(keys)
    assert {(row["sp_size"], row["stage"], row["offload"]) for row in rows} >= {(1, 3, "none"), (2, 3, "both")}
    # Such a row is the plan of that request.
    states = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    ds_config = json.loads((ROOT / "ds_configs" / "zero3_mst.json").read_text(encoding="utf-8"))
    ds_config["zero_optimization"] |= states
    (row,) = (row for row in rows if (row["sp_size"], row["offload"]) == (2, "both"))
    file = tmp_path / "states.json"
    file.write_text(json.dumps(ds_config), encoding="utf-8")
    planned = json.loads(ask(*flags[:-1], "--sp_size", "2", "--ds_config", str(file), "--json")[1])
    assert row["peak_bytes"] == planned["peak_bytes"]
    assert ask(*flags)[1].count("\n") == len(rows) + 4


def test_nodes_may_differ_and_the_weakest_decides(ask: Asked) -> None:
    flags = ("--num_nodes", "2", "--seq_len", "256K", "--json")
    mixed = (*LLAMA_8B[:-1], "A100-40GB", "H100", *flags, "--host_memory_gib", "1900", "800")
    found = json.loads(ask(*mixed)[1])
    assert found["device_memory"] == gpu_by_name("A100-40GB").memory
    assert found["host_memory"] == 100 * GIB
    alike = json.loads(ask(*LLAMA_8B[:-1], "A100-40GB", *flags, "--host_memory_gib", "800")[1])
    assert found["predicted_step_seconds"] == alike["predicted_step_seconds"]


RATES = {
    "name": "MI300X",
    "memory": 191 * GIB,
    "flops": 1307e12,
    "fp32_flops": 163e12,
    "memory_rate": 5300e9,
    "node_rate": 448e9,
    "network_rate": 50e9,
    "host_rate": 50e9,
    "capability": [9, 0],
}


def test_rates_of_a_gpu_of_ones_own(ask: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rates.json"
    flags = (*LLAMA_8B[:4], "--rates", str(file), "--seq_len", "1M")
    file.write_text(json.dumps(RATES), encoding="utf-8")
    found = json.loads(ask(*flags, "--json")[1])
    assert found["device_memory"] == 191 * GIB
    assert (
        found["predicted_step_seconds"]
        < json.loads(ask(*LLAMA_8B, "--seq_len", "1M", "--json")[1])["predicted_step_seconds"]
    )
    for wrong, message in (
        ({"flops": -1}, f"flops in {file} is -1; allowed: a number > 0, of FLOP/s or bytes/s"),
        ({"capability": 9}, f"capability in {file} is 9; allowed: two whole numbers, such as [9, 0]"),
        ({"memmory": 1}, f"{file} has the field 'memmory'; nearest: 'memory'; allowed: {', '.join(RATES)}"),
    ):
        file.write_text(json.dumps(RATES | wrong), encoding="utf-8")
        assert plan_command.main(flags) == 2
        assert capsys.readouterr().err == f"mst-plan: error: {message}\n"


def test_a_table_has_the_ranks_with_which_a_step_has_the_samples_of_the_json(ask: Asked, tmp_path: Path) -> None:
    file = tmp_path / "batch.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": 2}), encoding="utf-8")
    flags = (*LLAMA_8B, "--num_nodes", "2", "--ds_config", str(file), "--table", "--json")
    code, text = ask(*flags)
    assert (code, [(point["num_nodes"], point["sp_size"]) for point in json.loads(text)]) == (0, [(1, 4), (2, 8)])


def test_a_table_of_zeros_has_a_reason(ask: Asked) -> None:
    code, text = ask("--model", LLAMA_8B[1], "--gpu", "L4", "--table")
    assert code == 1
    assert text.splitlines()[-1].startswith(
        "0: not even 1024 tokens fit: device, optimizer_step: needs 127.6 GiB, 22.0 there"
    )


@pytest.mark.parametrize(
    "flags",
    [
        (*LLAMA_8B, *HOST, "--seq_len", "6M"),
        (*LLAMA_8B, "--seq_len", "4K", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3"),
        ("--model", "google/gemma-2-9b", "--gpu", "H200", "--num_gpus", "4", "--seq_len", "100001", "--sp_size", "2"),
    ],
    ids=["streamed", "batches", "sp_size"],
)
def test_the_plan_of_the_written_settings_is_the_plan_they_came_from(
    ask: Asked, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    file = tmp_path / "mine.json"
    first = json.loads(ask(*flags, "--write", str(file), "--json")[1])
    launch = first.pop("launch")
    given = [flag for flag in flags if flag not in ("--sp_size", "2") or "--sp_size" not in flags]
    second = json.loads(ask(*given, "--ds_config", str(file), "--json")[1])
    assert {key for key in first if first[key] != second[key]} <= {"max_seq_len", "changes_that_help"}
    assert [line.split()[0] for line in launch] == ["deepspeed", "sbatch"]
    assert "auto" not in [value for key, value in json.loads(file.read_text())["mst"].items() if "memory" not in key]


@pytest.mark.slow
def test_written_settings_train_by_the_line_that_is_printed(ask: Asked, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    flags = ("--model", "small_llama", "--num_gpus", "2", "--device_memory_gib", "4", "--seq_len", "512")
    code, text = ask(*flags, "--write", str(file))
    *_, settings, line, _ = text.splitlines()
    assert (code, settings) == (0, f"settings: {file}")
    launcher, *words = shlex.split(line)
    ours = ("--max_steps", "2", "--output_dir", str(tmp_path / "run"))
    done = run([launcher, "--master_port", free_port(), *words, *ours], limit=540)
    assert done.returncode == 0, done.stdout
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps if "loss" in step] == [1, 2]


def test_nothing_is_written_of_a_plan_that_does_not_fit(ask: Asked, tmp_path: Path) -> None:
    """Its report names the settings that were planned."""
    page = tmp_path / "plan.md"
    code, text = ask(*LLAMA_8B, "--seq_len", "8000K", "--write", str(tmp_path / "mine.json"), "--report", str(page))
    assert (code, text.splitlines()[-1]) == (1, "no settings are written: the plan does not fit")
    assert list(tmp_path.iterdir()) == [page]
    assert "mine.json" not in page.read_text()


def test_settings_are_written_over_those_of_before(ask: Asked, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    for seq_len in ("8K", "1M"):
        found = json.loads(ask(*LLAMA_8B, *HOST, "--seq_len", seq_len, "--write", str(file), "--json")[1])
        written = json.loads(file.read_text())["mst"]
        assert {name: found[name] for name in ("sp_size", "loss_chunks")}.items() <= written.items()
    assert list(tmp_path.iterdir()) == [file]


def test_a_report_has_the_answer_and_every_term(ask: Asked, tmp_path: Path) -> None:
    file = tmp_path / "plan.md"
    flags = (*LLAMA_8B, *HOST, "--seq_len", "1M")
    first, second = ask(*flags, "--report", str(file))[1].splitlines()[:2]
    page = file.read_text(encoding="utf-8")
    assert f"\n\n**{first}**\n\n{second}\n\n" in page
    assert "\ndeepspeed --num_gpus 8 launch/train.py --model meta-llama/Llama-3.1-8B --ds_config " in page
    for phase in json.loads(ask(*flags, "--json")[1])["phases"]:
        for term in phase["terms"]:
            row = (
                f"| {term['name']} | {term['place']} | {term['kind']} | {term['bytes'] / GIB:.3f} | {term['formula']} |"
            )
            assert row in page
