"""A request that cannot run: exit code 2 and one line on stderr, before weights load or processes meet."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import deepspeed
import pytest
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

import mst_ds.model_shape.positions
import mst_ds.model_shape.shape
import mst_ds.zero
from mst_ds.commands import train
from mst_ds.config import parse_train_config
from mst_ds.data import training_data
from mst_ds.engine import Launch, meeting, prepare
from mst_ds.entry_point import RequestError, one_line
from mst_ds.minisequence import mlp

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "train.py"
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 264,
}


class TooLateError(BaseException):  # no error of a run, at which the command ends its process
    """No ValueError, so that `main` lets it through."""


def too_late(name: str) -> Callable[..., Any]:
    def poisoned(*args: Any, **kwargs: Any) -> Any:
        raise TooLateError(name)

    return poisoned


@pytest.fixture(autouse=True)
def nothing_has_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """One process in the project's folder, for which it is too late once ranks meet or weights are read."""
    monkeypatch.setattr(deepspeed, "init_distributed", too_late("init_distributed"))
    monkeypatch.setattr(dist, "init_process_group", too_late("init_process_group"))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", too_late("from_pretrained"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, on one of `world_size` ranks; return its one line, without "mst-train: error: "."""

    def run(*flags: str, world_size: int | str = 1) -> str:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500} if world_size != 1 else {}
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world_size, **place}.items():
            monkeypatch.setenv(name, str(value))
        assert train.main(flags) == 2
        output = capsys.readouterr()
        assert output.out == ""
        return only_line(output.err)

    return run


def only_line(stderr: str) -> str:
    assert stderr.startswith("mst-train: error: ")
    assert stderr.count("\n") == 1, stderr
    assert stderr.endswith("\n")
    return stderr.removeprefix("mst-train: error: ")


def write(path: Path, content: str | dict[str, Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def model_folder(path: Path, config: dict[str, Any]) -> str:
    write(path / "config.json", config)
    write(path / "model.safetensors", "reading this fails")
    return str(path)


@pytest.mark.parametrize(
    ("content", "world_size", "says"),
    [
        ('{"zero_optimization": {"stage": 3},\n}', 1, ["is not JSON", "line 2, column 1"]),
        ("[]", 1, ["is a list"]),
        (
            {"mst": {"mlp_chunk": 4}},
            1,
            ["'mlp_chunk'", "nearest: 'mlp_chunks'", "allowed: sp_size, "],
        ),
        ({"zero_optimization": {"stage": 4}}, 1, ["stage is 4", "allowed: 0, 1, 2, 3"]),
        (
            {"zero_optimization": {"stage": "three"}},
            1,
            ["stage is 'three'", "allowed: 0, 1, 2, 3"],
        ),
        (
            {"mst": {"sp_size": 3}},
            4,
            ["sp_size is 3", "world size 4", "allowed: 1, 2, 4", "nearest: 2"],
        ),
        (
            {"mst": {"sp_size": 8}},
            8,
            ["sp_size is 8", "4 query heads", "allowed: 1, 2, 4", "nearest: 4"],
        ),
        ({"train_batch_size": 3}, 2, ["train_batch_size is 3", "allowed: 1 = "]),
        ({"bf16": {"enabled": True, "extra": 1}}, 1, ["unknown key 'bf16.extra'", "allowed: bf16_master"]),
        (
            {"mst": {"sp_size": 1}, "train_batch_size": 3},
            2,
            ["train_batch_size is 3", "allowed: 2 = "],
        ),
    ],
)
def test_ds_config(
    content: str | dict[str, Any], world_size: int, says: list[str], refused: Callable[..., str], tmp_path: Path
) -> None:
    line = refused("--ds_config", write(tmp_path / "ds.json", content), world_size=world_size)
    for words in says:
        assert words in line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ds_config", "missing.json"], ["'missing.json'", "an existing DeepSpeed JSON"]),
        (["--seq_len", "0"], ["seq_len is 0", "allowed: a whole number >= 1"]),
        (["--seq_len", "-5"], ["seq_len is -5", "allowed: a whole number >= 1"]),
        (["--sqe_len", "4096"], ["--sqe_len"]),
        (["--model", "smal_llama"], ["'smal_llama'", "nearest: 'small_llama'"]),
    ],
)
def test_flags(flags: list[str], says: list[str], refused: Callable[..., str]) -> None:
    line = refused(*flags)
    for words in says:
        assert words in line


@pytest.mark.parametrize(
    ("file", "content", "flags", "says"),
    [
        ("other.jsonl", "", [], "no such file or folder exists"),
        ("text.csv", "", [], "allowed: a .txt, .jsonl, .parquet file"),
        ("text.jsonl", '{"body": "a"}', [], "allowed: 'body'"),
        ("text.jsonl", '{"text": []}', [], "line 1 of"),
        ("text.jsonl", '{"messages": []}', [], "only chats in 'messages'"),
        ("text.txt", "a", ["--dataset_split", "nope"], "has no split 'nope'"),
    ],
)
def test_local_dataset_is_looked_at_before_anything_slow_is_imported(
    file: str,
    content: str,
    flags: list[str],
    says: str,
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mst_ds.engine", None)  # so that importing it fails
    dataset = Path(write(tmp_path / file, content))
    if file.startswith("other"):
        dataset.unlink()

    assert says in refused("--dataset", str(dataset), *flags)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("text.jsonl", '{"txet": "a"}\n', ["text_column is 'text'", "allowed: 'txet'", "nearest: 'txet'"]),
        ("text.txt", "", ["is empty", "at least one document"]),
        ("text.jsonl", "", ["is empty", "at least one document"]),
        ("text.jsonl", '{"text": ""}\n', ["the dataset has 0 tokens"]),
    ],
)
def test_dataset(file: str, content: str, says: list[str], refused: Callable[..., str], tmp_path: Path) -> None:
    line = refused("--dataset", write(tmp_path / file, content))
    for words in says:
        assert words in line


@pytest.mark.parametrize(
    ("config", "world_size", "says"),
    [
        ({"model_type": "bert"}, 1, ["'bert' is not a decoder"]),
        ({"model_type": "t5"}, 1, ["'t5' is not a decoder"]),
        ({"model_type": "stablelm", **TINY}, 1, ["packing is 'documents'", "StableLmForCausalLM", "allowed: 'none'"]),
        ({"model_type": "bloom", **TINY}, 2, ["BloomForCausalLM", "attention interface", "use sp_size 1"]),
        (
            {"model_type": "minimax", **TINY, "layer_types": ["linear_attention"]},
            2,
            ["layers of type linear_attention", "use sp_size 1"],
        ),
    ],
)
def test_model(
    config: dict[str, Any], world_size: int, says: list[str], refused: Callable[..., str], tmp_path: Path
) -> None:
    line = refused("--model", model_folder(tmp_path / "model", config), world_size=world_size)
    for words in says:
        assert words in line


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 264, "n_positions": 63}


@pytest.mark.parametrize("is_known", [True, False], ids=["by-its-name", "by-its-embedding"])
def test_fewer_positions_than_tokens(
    is_known: bool, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_known:
        monkeypatch.setattr(mst_ds.model_shape.positions, "_TABLES", frozenset())
    line = refused("--model", model_folder(tmp_path / "model", GPT2), "--seq_len", "64")
    assert line == "seq_len is 64, but the model has 63 positions; allowed: --seq_len 63 or less\n"


def test_more_tokens_than_rope_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mst_ds.model_shape.shape, "rotary_positions", lambda config: 63)
    dataset = write(tmp_path / "text.txt", "some text " * 20)
    for seq_len, warns in (("63", False), ("64", True)):
        config = parse_train_config(["--dataset", dataset, "--seq_len", seq_len, "--preflight", "false"])
        notes = prepare(config, Launch.from_environment()).notes
        said = [note for note in notes if "the model's config knows 63 positions" in note]
        assert bool(said) == warns


def test_a_peft_config_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "allowed: an existing adapter_config.json" in refused("--peft_config", str(tmp_path))


def test_a_model_that_would_not_train_exactly(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = ["--dataset", write(tmp_path / "text.txt", "some text " * 20), "--seq_len", "64"]
    flags += ["--output_dir", str(tmp_path / "run")]
    right = mlp._ChunkedMLP.backward

    def one_part_in_a_thousand_too_large(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Of the weights; hidden states have three dimensions."""
        return tuple(1.001 * grad if grad is not None and grad.dim() == 2 else grad for grad in right(ctx, dy))

    monkeypatch.setattr(mlp._ChunkedMLP, "backward", staticmethod(one_part_in_a_thousand_too_large))
    with monkeypatch.context() as patched:
        patched.setattr(training_data, "load_documents", too_late("load_documents"))
        line = refused(*flags)
    assert "preflight: LlamaForCausalLM is not exact: model.layers." in line
    assert ".mlp" in line
    with pytest.raises(TooLateError, match=r"init_(distributed|process_group)"):
        train.main([*flags, "--preflight", "false"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ds_config", "ds.json"], "which has no fp32"),
        (["--model", "gpt2"], "the model has 63 positions"),
        (["--model", "llama"], "are cut off or damaged"),
        (["--output_dir", "held"], "is that of a run which is going on"),
    ],
    ids=["plan", "positions", "weights", "output_dir"],
)
def test_data_is_read_when_nothing_else_can_refuse_the_run(
    flags: list[str], says: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(tmp_path / "ds.json", {"mst": {"attention": "flash_attention_2"}})
    model_folder(tmp_path / "gpt2", GPT2)
    model_folder(tmp_path / "llama", {"model_type": "llama", **TINY})
    (tmp_path / "held").mkdir()
    monkeypatch.setattr(training_data, "load_documents", too_late("load_documents"))
    others = ["--dataset", write(tmp_path / "text.txt", "some text " * 20), "--seq_len", "64", "--preflight", "false"]
    others += ["--output_dir", str(tmp_path / "run")]
    with FileLock(tmp_path / "held" / ".lock"):
        assert says in refused(*others, flags[0], str(tmp_path / flags[1]))
    with pytest.raises(TooLateError, match="load_documents"):
        train.main(others)
    assert not (tmp_path / "run").exists()


def test_stage_0_in_16_bits(refused: Callable[..., str], tmp_path: Path) -> None:
    ds_config = write(tmp_path / "ds.json", json.dumps({"bf16": {"enabled": True}}))
    assert "the ZeRO stage is 0 in bf16" in refused("--ds_config", ds_config)


def test_model_folder_without_config(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "has no config.json" in refused("--model", str(tmp_path))


def test_output_dir_below_a_file(refused: Callable[..., str], tmp_path: Path) -> None:
    file = write(tmp_path / "file", "")
    assert f"{file} is a file; allowed: a folder" in refused("--output_dir", f"{file}/run")


def test_another_rank_lets_the_first_of_its_node_speak(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    order = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(train.time, "sleep", lambda seconds: order.append((seconds, capfd.readouterr())))
    assert train.main(["--seq_len", "0"]) == 2
    assert order == [(10.0, ("", ""))], "it spoke before it waited"
    # The launcher would have ended it by now; it was not, so the error is this rank's alone.
    assert "seq_len is 0" in only_line(capfd.readouterr().err)


def test_two_ranks_say_it_once() -> None:
    command = ["deepspeed", "--num_gpus", "2", str(SCRIPT), "--seq_len", "0"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("mst-train: error")]
    assert len(said) == 1
    assert "seq_len is 0" in said[0]


def test_as_a_command() -> None:
    command = [sys.executable, str(SCRIPT), "--ds_config", "missing.json"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "'missing.json'" in only_line(done.stderr)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--max_steps", "x"), "argument --max_steps/--max-steps: invalid int value: 'x'"),
        (("--seq_len", "x"), "seq_len is 'x'"),
        (("--sqe_len", "5"), "unknown flag '--sqe_len'; nearest: '--seq_len'"),
        (
            ("--use_peft", "true"),
            "unknown flag '--use_peft'; here it is --peft_config with an adapter_config.json; --help",
        ),
        (
            ("--per-device-train-batch-size=2",),
            "here it is train_micro_batch_size_per_gpu in the DeepSpeed JSON; --help",
        ),
        (("--bananas", "1"), "unknown flag '--bananas'; --help lists the flags"),
        (("--learning_rate", "inf"), "learning_rate is inf; allowed: a number > 0 and at most 1000"),
        (("--weight_decay", "inf"), "weight_decay is inf; allowed: a number >= 0 and at most 1000"),
        (("--adam_epsilon", "inf"), "adam_epsilon is inf; allowed: a number > 0 and at most 1"),
        (("--hang_timeout", "1e10"), "hang_timeout is 10000000000.0; allowed: seconds, 1 to 31622400, a year"),
        (("--hang_timeout", "1e-3"), "hang_timeout is 0.001; allowed: seconds, 1 to 31622400, a year"),
        (("--max_steps", "1" + "0" * 30), "allowed: a whole number >= 1 and at most 1099511627776"),
        (("--seq_len", "1099511627776"), "seq_len is 1099511627776; allowed: a whole number >= 1 and at most"),
        (("--ds_config", "n" * 300), "File name too long; allowed: a path that can be"),
        (
            ("--output_dir", "~nobody_of_this_name/x"),
            "output_dir is '~nobody_of_this_name/x', but there is no such user",
        ),
    ],
)
def test_flags_that_argparse_refuses(refused: Callable[..., str], flags: tuple[str, ...], says: str) -> None:
    assert says in refused(*flags)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RecursionError("x"), OverflowError("x")])
def test_what_a_request_may_raise(
    error: Exception, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(argv: object) -> None:
        raise error

    monkeypatch.setattr(train, "parse_train_config", raises)
    assert refused() == f"{one_line(error)}\n"


def test_a_mistake_of_ours_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "parse_train_config", None)
    with pytest.raises(TypeError):
        train.main([])


def test_an_environment_that_is_no_launchers(refused: Callable[..., str]) -> None:
    assert "WORLD_SIZE is 'x'" in refused(world_size="x")


def test_ranks_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait_in_vain(**kwargs: Any) -> None:
        raise dist.DistStoreError("Timed out after 3 seconds waiting for clients. 1/2 clients joined.")

    monkeypatch.setattr(deepspeed, "init_distributed", wait_in_vain)
    for name in ("build_shared_memory_collective", "stay_on_node"):
        monkeypatch.setattr(meeting, name, lambda: None)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    run: Any = SimpleNamespace(config=SimpleNamespace(hang_timeout=2.0), launch=Launch(1, 2, 0, 2))
    with pytest.raises(RequestError, match=r"not all ranks came to 127\.0\.0\.1:29500, .*: Timed out after 3 seconds"):
        meeting.meet(run)


def test_a_request_that_can_run_lets_processes_meet(tmp_path: Path) -> None:
    # Without this one, all others would pass with a command that refuses everything, or meets by another way.
    dataset = write(tmp_path / "text.txt", "some text " * 20)
    with pytest.raises(TooLateError, match=r"init_(distributed|process_group)"):
        train.main(["--dataset", dataset, "--seq_len", "64", "--output_dir", str(tmp_path / "run")])


def test_the_json_is_read_and_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(mst_ds.zero, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return call

    for name in ("read_json", "resolve"):
        monkeypatch.setattr(mst_ds.zero, name, counted(name))
    flags = ["--dataset", write(tmp_path / "text.txt", "some text " * 20), "--seq_len", "64"]
    prepare(parse_train_config([*flags, "--preflight", "false"]), Launch.from_environment())
    assert calls == ["read_json", "resolve"]
