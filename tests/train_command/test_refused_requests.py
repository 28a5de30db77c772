"""A request that cannot run: exit code 2 and one line on stderr, before weights load or processes meet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusals import GPT2, TINY, model_folder, write

import mst_ds.model_shape.shape
from mst_ds.config_parser import parse_train_config
from mst_ds.engine import Launch, prepare

# It keeps its own attention.
ALIBI = {"model_type": "falcon", **TINY, "alibi": True}


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
    ("flags", "says"),
    [
        (("--max_steps", "x"), "argument --max_steps/--max-steps: invalid int value: 'x'"),
        (("--seq_len", "x"), "seq_len is 'x'"),
        (
            ("--max_steps", "9", "--num_train_epochs", "1.5"),
            "num_train_epochs is 1.5 and max_steps is 9; allowed: one of them",
        ),
        (("--sqe_len", "5"), "unknown flag '--sqe_len'; nearest: '--seq_len'"),
        (
            ("--use_peft", "true"),
            "unknown flag '--use_peft'; here it is --lora_r, or --peft_config with an adapter_config.json; --help",
        ),
        (
            ("--per-device-eval-batch-size=2",),
            "here it is --per_device_train_batch_size, which is that of evaluations too; --help",
        ),
        (("--load_in_4bit", "true"), "here it is nothing: weights are in 16 or 32 bits, because their products are"),
        (("--bananas", "1"), "unknown flag '--bananas'; --help lists the flags"),
        (("--objective", "dpo", "--text_column", "prompt"), "text_column is given, but objective 'dpo' reads answers"),
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


def test_stage_0_in_16_bits(refused: Callable[..., str], tmp_path: Path) -> None:
    ds_config = write(tmp_path / "ds.json", json.dumps({"bf16": {"enabled": True}}))
    assert "the ZeRO stage is 0 in bf16" in refused("--ds_config", ds_config)


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
        (ALIBI, 1, ["packing is 'documents'", "FalconForCausalLM", "allowed: 'none'"]),
        (ALIBI, 2, ["FalconForCausalLM", "attention interface", "use sp_size 1"]),
        (
            {"model_type": "zaya", **TINY},
            2,
            ["layers of type hybrid", "use sp_size 1"],
        ),
    ],
)
def test_model(
    config: dict[str, Any], world_size: int, says: list[str], refused: Callable[..., str], tmp_path: Path
) -> None:
    line = refused("--model", model_folder(tmp_path / "model", config), world_size=world_size)
    for words in says:
        assert words in line


def test_model_folder_without_config(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "has no config.json" in refused("--model", str(tmp_path))


@pytest.mark.parametrize("is_known", [True, False], ids=["by-its-name", "by-its-embedding"])
def test_fewer_positions_than_tokens(
    is_known: bool, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_known:
        monkeypatch.setattr(mst_ds.model_shape.shape, "fixed_positions", lambda config: None)
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


def test_output_dir_below_a_file(refused: Callable[..., str], tmp_path: Path) -> None:
    file = write(tmp_path / "file", "")
    assert f"{file} is a file; allowed: a folder" in refused("--output_dir", f"{file}/run")


def test_an_environment_that_is_no_launchers(refused: Callable[..., str]) -> None:
    assert "WORLD_SIZE is 'x'" in refused(world_size="x")
