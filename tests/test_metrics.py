"""What rank 0 writes can be read back by a strict reader; other ranks write nothing."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import DeepseekV3Config, Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig

from mst_ds.metrics import MetricsWriter, peak_flops, peak_memory_bytes
from mst_ds.model_shape import ModelShape, flops_per_token
from mst_ds.phase_memory import PhaseMemory

MEMORY = [PhaseMemory("forward", 2 * 2**30, 2**30), PhaseMemory("backward", 4 * 2**30, 5 * 2**30)]
BY_PHASE = {
    "planned_bytes": {"forward": 2 * 2**30, "backward": 4 * 2**30},
    "measured_bytes": {"forward": 2**30, "backward": 5 * 2**30},
}
STEP: dict[str, Any] = {
    "loss": 2.5,
    "tokens_per_second": 2000.0,
    "grad_norm": 1.5,
    "learning_rate": 1e-3,
    "device_memory_bytes": 3 * 2**30,
    "seconds": 4.0,
    "tokens": 8000,
}


def quiet() -> Console:
    return Console(file=io.StringIO())


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def writer(folder: Path, **options: Any) -> MetricsWriter:
    return MetricsWriter(folder, **{"max_steps": 3, "console": quiet(), **options})


def read_lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def read_events(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_step_and_an_evaluation_are_a_json_line_each(tmp_path: Path) -> None:
    with writer(tmp_path / "made" / "here") as metrics:
        metrics.log_step(1, **STEP)
        metrics.log_eval(1, 2.25)
    assert read_lines(tmp_path / "made" / "here") == [
        {
            "step": 1,
            "loss": 2.5,
            "tokens_per_second": 2000.0,
            "grad_norm": 1.5,
            "lr": 1e-3,
            "memory_bytes": 3 * 2**30,
            "seconds": 4.0,
            "tokens": 8000,
            "skipped_steps": 0,
        },
        {"step": 1, "eval_loss": 2.25},
    ]


def test_a_run_goes_on_after_the_steps_it_has_taken(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.log_step(1, **STEP)
        metrics.log_step(2, **{**STEP, "loss": math.nan}, is_skipped=True)
        metrics.log_eval(2, 2.25)
        metrics.log_step(3, **{**STEP, "loss": 9.0})
    before = read_lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    with writer(tmp_path, steps_done=2) as metrics:
        metrics.log_step(3, **{**STEP, "loss": 1.0})
        metrics.write_summary({})
    after = read_lines(tmp_path)
    assert after[:-1] == before[:-1]
    assert (after[-1]["step"], after[-1]["loss"], after[-1]["skipped_steps"]) == (3, 1.0, 1)
    assert read_events(tmp_path, "train/loss")[-1] == (3, 1.0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    totals = {name: summary[name] for name in ("first_loss", "final_loss", "steps", "skipped_steps", "tokens")}
    assert totals == {"first_loss": 2.5, "final_loss": 1.0, "steps": 3, "skipped_steps": 1, "tokens": 24000}


def test_a_run_that_does_not_go_on_begins_the_file_anew(tmp_path: Path) -> None:
    for _ in range(2):
        with writer(tmp_path) as metrics:
            metrics.log_step(1, **STEP)
    assert [line["step"] for line in read_lines(tmp_path)] == [1]


def test_memory_by_phase_goes_to_every_file(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.log_memory(1, MEMORY)
        metrics.write_summary({})
    assert read_lines(tmp_path) == [{"step": 1, **BY_PHASE}]
    for name, of_phases in BY_PHASE.items():
        for phase, count in of_phases.items():
            assert read_events(tmp_path, f"{name}/{phase}") == [(1, float(count))]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: summary[name] for name in BY_PHASE} == BY_PHASE


def test_memory_is_shown_as_a_table_and_the_highest_phase_beside_each_step(tmp_path: Path) -> None:
    console = quiet()
    with writer(tmp_path, max_steps=1, console=console) as metrics:
        metrics.log_memory(1, MEMORY)
        metrics.log_step(1, **STEP)
    text = shown(console)
    rows = [line.replace("│", " ").split() for line in text.splitlines()]
    assert ["forward", "2.000", "1.000", "-50.0%"] in rows
    assert ["backward", "4.000", "5.000", "+25.0%"] in rows
    assert [line for line in text.splitlines() if "warning" in line] == [MEMORY[1].warning]
    assert "3.00 GiB (backward +25% of plan)" in text.splitlines()[-1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_hold_becomes_null(tmp_path: Path, value: float) -> None:
    with writer(tmp_path) as metrics:
        metrics.log_step(1, **{**STEP, "loss": value, "grad_norm": None})
        metrics.log_eval(1, value)
        metrics.write_summary({"nested": {"list": [value, 1.0]}})
    step, evaluation = read_lines(tmp_path)
    assert (step["loss"], step["grad_norm"], evaluation["eval_loss"]) == (None, None, None)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["final_loss"] is None
    assert summary["nested"] == {"list": [None, 1.0]}


def test_a_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        for step in (1, 2):
            metrics.log_step(step, **STEP)
            assert [line["step"] for line in read_lines(tmp_path)] == list(range(1, step + 1))


def test_tensorboard_reads_the_events_back(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.log_step(1, **STEP)
        metrics.log_step(2, **{**STEP, "loss": 1.25, "grad_norm": None})
        metrics.log_eval(2, 1.5)
    assert read_events(tmp_path, "train/loss") == [(1, 2.5), (2, 1.25)]
    assert read_events(tmp_path, "train/grad_norm") == [(1, 1.5)]
    assert read_events(tmp_path, "train/lr") == [(1, pytest.approx(1e-3)), (2, pytest.approx(1e-3))]
    assert read_events(tmp_path, "eval/loss") == [(2, 1.5)]


def test_a_second_run_in_the_folder_replaces_the_first(tmp_path: Path) -> None:
    for losses in ([9.0, 8.0, 7.0], [5.0]):
        with writer(tmp_path) as metrics:
            for step, loss in enumerate(losses, start=1):
                metrics.log_step(step, **{**STEP, "loss": loss})
    assert [line["loss"] for line in read_lines(tmp_path)] == [5.0]
    assert read_events(tmp_path, "train/loss") == [(1, 5.0)]


def test_other_ranks_write_and_show_nothing(tmp_path: Path) -> None:
    console = quiet()
    with writer(tmp_path / "run", rank=1, console=console) as metrics:
        metrics.log_step(1, **STEP)
        metrics.log_eval(1, 2.0)
        metrics.log_memory(1, MEMORY)
        metrics.write_summary({"plan": {}})
    assert not (tmp_path / "run").exists()
    assert shown(console) == ""


def test_the_summary_holds_totals_versions_and_the_given_fields(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.log_step(1, **{**STEP, "loss": 4.0, "device_memory_bytes": 10, "seconds": 6.0})
        metrics.log_step(2, **{**STEP, "loss": 5.0, "device_memory_bytes": 30, "seconds": 1.0})
        metrics.log_step(3, **{**STEP, "loss": 2.0, "device_memory_bytes": 20, "seconds": 1.0})
        metrics.write_summary({"plan": {"mlp_chunks": 4}, "steps": 7})
    summary = json.loads((tmp_path / "summary.json").read_text())
    versions = summary.pop("versions")
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "deepspeed", "transformers"} <= versions.keys()
    assert summary == {
        "first_loss": 4.0,
        "final_loss": 2.0,
        "steps": 7,
        "skipped_steps": 0,
        "tokens": 24000,
        "seconds": 8.0,
        "tokens_per_second": 3000.0,
        "peak_memory_bytes": 30,
        "plan": {"mlp_chunks": 4},
    }


def test_a_summary_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with writer(tmp_path) as metrics:
        metrics.write_summary({"attempt": 1})
        with pytest.raises(TypeError, match="not JSON serializable"):
            metrics.write_summary({"attempt": object()})

        def disk_full(path: Path, text: str, **_: Any) -> int:
            path.write_bytes(text[: len(text) // 2].encode())
            raise OSError("No space left on device")

        monkeypatch.setattr(Path, "write_text", disk_full)
        with pytest.raises(OSError, match="No space"):
            metrics.write_summary({"attempt": 2})
    assert json.loads((tmp_path / "summary.json").read_text())["attempt"] == 1


def test_mfu_is_written_where_the_peak_is_known(tmp_path: Path) -> None:
    # 2000 tokens/s of 1e6 FLOPs each are half of 4e9 FLOP/s.
    with writer(tmp_path, flops_per_token=1e6, peak_flops=4e9) as metrics:
        metrics.log_step(1, **STEP)
    assert read_lines(tmp_path)[0]["mfu"] == pytest.approx(0.5)
    with writer(tmp_path, flops_per_token=1e6, peak_flops=None) as metrics:
        metrics.log_step(1, **STEP)
    assert "mfu" not in read_lines(tmp_path)[0]


def test_without_a_terminal_a_line_comes_every_ten_seconds_of_steps(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=40)
    with writer(tmp_path, max_steps=8, console=console) as metrics:
        for step in range(1, 9):
            metrics.log_step(step, **STEP)  # 4 s each
        metrics.log_eval(8, 1.5)
    lines = shown(console).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 1/8",
        "step 4/8",
        "step 7/8",
        "step 8/8",
        "step 8: evaluation loss 1.5000",
    ]
    assert lines[1] == ("step 4/8  loss 2.5000  2,000 tokens/s  lr 1.00e-03  grad norm 1.50  3.00 GiB  0:00:16 left")


def test_a_slow_first_step_does_not_spoil_the_time_left(tmp_path: Path) -> None:
    console = quiet()
    with writer(tmp_path, max_steps=100, console=console) as metrics:
        for step, seconds in enumerate([600.0, 2.0, 2.0, 20.0], start=1):
            metrics.log_step(step, **{**STEP, "seconds": seconds})
    assert shown(console).splitlines()[-1].endswith("0:17:36 left")


def test_on_a_terminal_a_bar_shows_the_metrics_and_the_terminal_is_restored(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    with pytest.raises(RuntimeError, match="out of memory"), writer(tmp_path, console=console) as metrics:
        metrics.log_step(1, **STEP)
        raise RuntimeError("out of memory")
    text = shown(console)
    for part in ("1/3", "━", "loss 2.5000", "2,000 tokens/s", "grad norm 1.50", "3.00 GiB", "0:00:08 left"):
        assert part in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor: hidden, and shown again


def tiny_shape(*, tied: bool) -> ModelShape:
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=10,
        tie_word_embeddings=tied,
    )
    return ModelShape.from_config(config)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_per_token_by_hand(tied: bool) -> None:
    query_and_output, key_and_value = 2 * 8 * 16, 2 * 8 * 8
    layer = query_and_output + key_and_value + 3 * 8 * 16 + 2 * 8  # + MLP + two norms
    multiplied = 2 * layer + 8 + 10 * 8  # + final norm + head; the embedding counts only as the tied head
    assert flops_per_token(tiny_shape(tied=tied), 100) == 6 * multiplied + 6 * 2 * 16 * 100


def test_flops_are_those_of_the_experts_that_a_token_meets() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "vocab_size": 10}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 7, "num_experts_per_tok": 2}
    one_more = MixtralConfig(**sizes | {"num_experts_per_tok": 3})
    difference = [flops_per_token(ModelShape.from_config(config), 100) for config in (one_more, MixtralConfig(**sizes))]
    assert difference[0] - difference[1] == 6 * 3 * (3 * 8 * 16)  # in three layers one more expert of three matrices


def test_positions_are_looked_up_and_not_multiplied() -> None:
    shapes = [ModelShape.from_config(GPT2Config(n_positions=length)) for length in (100, 200)]
    assert flops_per_token(shapes[0], 100) == flops_per_token(shapes[1], 100)


def test_latent_attention_has_values_of_another_width() -> None:
    config = DeepseekV3Config(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=10,
    )
    short, long = (flops_per_token(ModelShape.from_config(config), seq_len) for seq_len in (100, 300))
    # Products with keys of 20 and with values of 10, forward and backward, over 100 tokens more on average.
    assert long - short == 2 * 3 * 2 * 4 * (20 + 10) * 100


@pytest.mark.parametrize(("seq_len", "window"), [(100, 10), (100, 100), (100, 1000)])
def test_a_sliding_window_bounds_what_a_token_attends_to(seq_len: int, window: int) -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 10}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    kinds = {
        kind: ModelShape.from_config(Gemma2Config(**sizes, sliding_window=window, layer_types=["full_attention", kind]))
        for kind in ("full_attention", "sliding_attention")
    }
    full, sliding = (flops_per_token(shape, seq_len) for shape in kinds.values())
    # One layer's, over a triangle of scores without the one that lies outside of the window.
    width = max(0, seq_len - window)
    assert full - sliding == pytest.approx(12 * 4 * 4 * (width**2 / 2) / seq_len)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_flops_by_device_name(monkeypatch: pytest.MonkeyPatch, name: str, teraflops: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = None if teraflops is None else pytest.approx(teraflops * 1e12)
    assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == expected
    assert peak_flops(torch.device("cuda", 0), torch.float32) is None


def test_the_peak_of_a_cpu_is_unknown() -> None:
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_cpu_memory_counts_what_the_process_holds() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    after = peak_memory_bytes(torch.device("cpu"))
    assert after - before >= 0.9 * held.nbytes
