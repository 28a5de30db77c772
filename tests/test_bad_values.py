"""Configs of models and adapters, streams and the environment: what cannot run is one line."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT

from mst_ds.adapters import load_peft_config, model_on_meta
from mst_ds.command_line.entry_point import console, one_line, run_on_without_output
from mst_ds.command_line.flags import OneLineParser
from mst_ds.engine.launch import Launch
from mst_ds.model_shape import ModelShape, load_model_config

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 264,
}
LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}


def written(path: Path, values: dict[str, Any]) -> str:
    path.write_text(json.dumps(values))
    return str(path)


def build(folder: Path, changes: dict[str, Any]) -> None:
    written(folder / "config.json", TINY | changes)
    config = load_model_config(str(folder))
    ModelShape.from_config(config)
    model_on_meta(config, None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_act": "foo"}, "hidden_act in the config of model type 'llama' is 'foo'; allowed: a word that"),
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1.0}}, "rope_parameters.rope_type in .* is 'foo'"),
        ({"dtype": "float99"}, "config.json cannot be read: .*float99"),
        ({"pad_token_id": 264}, "pad_token_id .* is 264; allowed: null, or a token of the vocabulary, 0 to 263"),
        ({"attention_dropout": 2}, "attention_dropout .* is 2; allowed: a number from 0 up to"),
        ({"model_type": "gpt2", "attn_pdrop": 2}, "attn_pdrop .* is 2; allowed: a number from 0 up to"),
        ({"model_type": "mixtral", "num_local_experts": 10**6}, "num_local_experts .* is 1000000; allowed: a whole"),
        ({"pad_token_id": -2}, "pad_token_id .* is -2; allowed: null, or a token"),
        ({"of_its_own": float("nan")}, "of_its_own .* is nan; allowed: a number$"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps .* is nan; allowed: a number"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps .* is 0.0; allowed: a number > 0"),
        ({"rope_theta": -1.0}, "rope_parameters.rope_theta .* is -1.0; allowed: a number > 0"),
        ({"max_position_embeddings": -3}, "max_position_embeddings .* is -3; allowed: a whole number >= 1"),
        ({"vocab_size": 10**12}, "vocab_size .* is 1000000000000; allowed: a whole number of at most 2147483648"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers .* is 10000000; allowed: a whole number of at most 10000"),
        ({"vocab_size": 2**31, "hidden_size": 2**24}, "has the sizes of .* parameters; allowed: at most 1e"),
        ({"head_dim": 0}, "the model of type 'llama' cannot be built: ZeroDivisionError"),
        ({"model_type": ["llama"]}, "config.json cannot be read: "),
    ],
)
def test_a_config_of_a_model(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        build(tmp_path, changes)


def test_a_config_with_a_key_twice(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY)[:-1] + ', "hidden_size": 64}')
    with pytest.raises(ValueError, match=r"config.json has the key 'hidden_size' twice; allowed: once"):
        load_model_config(str(tmp_path))


def test_configs_that_are_published(tmp_path: Path) -> None:
    build(tmp_path, {"pad_token_id": -1, "attention_dropout": 0.1, "unknown": [0.0, float("inf")]})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        *(({"r": rank}, f"r in peft_config .* is {rank!r}; allowed: a whole number from 1") for rank in ("x", 0, True)),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern.q_proj in peft_config .* is -1; allowed"),
        ({"target_modules": "(q_proj"}, "target_modules .* is '.q_proj'; allowed: a list of names, 'all-linear' or a"),
        ({"target_modules": 3}, "peft_config with this model cannot be built: TypeError"),
        ({"target_modules": ["nope"]}, "peft_config with this model cannot be built: Target modules"),
        ({"modules_to_save": ["nope"]}, "modules_to_save in peft_config has 'nope', which no module"),
        ({"r": 2**21}, "r in peft_config .* is 2097152; allowed: a whole number from 1 to"),
        ({"alpha_pattern": {"q_proj": -1}}, "q_proj in peft_config .* is -1; allowed: a number > 0"),
        ({"lora_alpha": 1e9}, "lora_alpha .* is 1000000000.0; allowed: a number > 0 and at most"),
        ({"exclude_modules": "(x"}, "exclude_modules .* is '.x'; allowed: a list of names"),
        ({"rank_pattern": {"(x": 2}}, r"rank_pattern.\(x .* is '.x'; allowed: a list of names"),
        ({"lora_alpha": "x"}, "lora_alpha .* is 'x'; allowed: a number > 0"),
        ({"lora_dropout": 2}, "lora_dropout .* is 2; allowed: a number from 0 up to"),
        ({"use_dora": "yes"}, "use_dora in peft_config .* is 'yes'; allowed: true or false"),
        (
            {"target_parameters": ["experts.nope"]},
            "target_parameters in peft_config has 'experts.nope', which no param",
        ),
        ({"lora_alph": 2}, "has the unknown key 'lora_alph'; nearest: 'lora_alpha'"),
        ({"bias": "foo"}, "cannot be built: NotImplementedError"),
        ({"peft_type": 3}, "is not a config of peft"),
    ],
)
def test_a_config_of_adapters(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    written(tmp_path / "config.json", TINY)
    file = written(tmp_path / "adapter_config.json", LORA | changes)
    with pytest.raises(ValueError, match=says):
        model_on_meta(load_model_config(str(tmp_path)), load_peft_config(file))


def test_adapters_that_are_right(tmp_path: Path) -> None:
    written(tmp_path / "config.json", TINY)
    values = LORA | {"modules_to_save": ["lm_head"], "lora_alpha": 8, "lora_dropout": 0.0, "of_a_later_peft": 1}
    config = load_peft_config(written(tmp_path / "adapter_config.json", values))
    model_on_meta(load_model_config(str(tmp_path)), config)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; allowed: a whole number from 1"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'; allowed: a whole number from 1 to 2"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is '3'; allowed: a whole number from 1 to 2"),
        ({"RANK": "2"}, "RANK is '2'; allowed: a whole number from 0 to 1"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'; allowed: a whole number from 0 to 1"),
        ({"RANK": "\u0661"}, "RANK is '\u0661'; allowed"),
        ({"RANK": "0000000001"}, "RANK is '0000000001'; allowed: a whole number from 0 to 1"),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": ""}, "MASTER_PORT is not set for 1 ranks"),
        ({"MASTER_PORT": "text"}, "MASTER_PORT is 'text'; allowed: a whole number from 1 to 65535"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999'; allowed: a whole number from 1 to 65535"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set for 2 ranks; allowed: the place where they meet"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set for 2 ranks"),
    ],
)
def test_the_environment_of_a_rank(changes: dict[str, str], says: str) -> None:
    right = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert Launch.from_environment(right) == Launch(1, 2, 1, 2)
    with pytest.raises(ValueError, match=says):
        Launch.from_environment(right | changes)


def test_without_a_launcher_a_run_is_one_process() -> None:
    assert Launch.from_environment({"LOCAL_SIZE": "2"}) == Launch(0, 1, 0, 1)
    assert Launch.from_environment({"WORLD_SIZE": "1"}) == Launch(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("a\nb"), "a b"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "x: File name too long"),
        (RecursionError("deep"), "something in the request is nested too deeply (deep)"),
        (OverflowError("large"), "OverflowError: large"),
        (ValueError(), "ValueError: "),
        (ValueError("x" * 9999), "x" * 1500 + " ..."),
    ],
)
def test_what_is_said_of_an_error(error: Exception, says: str) -> None:
    assert one_line(error) == says


def test_a_run_goes_on_without_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    there = io.StringIO()
    monkeypatch.setattr(sys, "stdout", there)
    monkeypatch.setattr(sys, "stderr", Gone())
    run_on_without_output()
    print("text", flush=True)
    print("text", file=sys.stderr, flush=True)
    sys.stderr.writelines(["text"])
    assert there.getvalue() == "text\n"


# What is still in a buffer when the command ends is where errors come late.
BUFFERED = {"PYTHONUNBUFFERED": ""}
# The least command: it prints its arguments, and a letter that is not ASCII.
SCRIPT = """
import sys
from mst_ds.command_line.entry_point import refuse, run_command
def main(argv):
    if argv == ["late"]:
        print("some output")
    if argv == ["--help"]:
        print("help")
        sys.exit(0)
    if argv == ["table"]:
        try:
            print("a result", flush=True)
        except OSError as error:
            return refuse("x.py", error)
    if argv in (["bad"], ["late"]):
        return refuse("x.py", ValueError("no\\nlines"))
    print(f"\u00e4 {sys.flags.utf8_mode} {argv}")
    return 0
sys.exit(run_command("x.py", main))
"""


@pytest.mark.parametrize(
    ("line", "code", "output", "error"),
    [
        ("COMMAND a b", 0, "ä 0 ['a', 'b']\n", ""),
        ("COMMAND bad", 2, "", "x.py: error: no lines\n"),
        ("COMMAND bad >/dev/full", 2, "", "x.py: error: no lines\n"),
        ("COMMAND bad 2>/dev/full", 2, "", ""),
        ("COMMAND late >/dev/full", 2, "", "x.py: error: no lines\n"),
        ("COMMAND table >/dev/full", 2, "", "x.py: error: standard output: No space left on device\n"),
        ("COMMAND --help", 0, "help\n", ""),
        ("COMMAND --help >/dev/full", 2, "", "x.py: error: standard output: No space left on device\n"),
        ("COMMAND > /dev/full", 2, "", "x.py: error: standard output: No space left on device\n"),
        ("COMMAND <&- >&- 2>&-", 0, "", ""),
        ("LC_ALL=POSIX PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 COMMAND a", 0, "ä 1 ['a']\n", ""),
    ],
)
def test_streams_of_a_command(line: str, code: int, output: str, error: str, tmp_path: Path) -> None:
    script = tmp_path / "x.py"
    script.write_text(SCRIPT, encoding="utf-8")
    line = line.replace("COMMAND", f"{sys.executable} {script}")
    done = subprocess.run(
        ["bash", "-c", line], check=False, cwd=ROOT, env=os.environ | BUFFERED, capture_output=True, timeout=120
    )
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (code, output, error)


def test_help_that_cannot_be_printed_is_an_error() -> None:
    """Also where the stream has no buffer, whose last flush would tell."""
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        OneLineParser().print_help(io.TextIOWrapper(full, write_through=True))


def test_a_reader_that_has_ended(tmp_path: Path) -> None:
    script = tmp_path / "x.py"
    script.write_text(SCRIPT, encoding="utf-8")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, check=False, cwd=ROOT, env=os.environ | BUFFERED, stdout=writer, stderr=subprocess.PIPE, timeout=120
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (2, b"")


def test_a_reader_that_has_ended_ends_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        console().print("text")


def test_a_table_in_a_column(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    monkeypatch.setenv("COLUMNS", "1")
    table = Table("phase", "GiB", "difference")
    table.add_row("forward", "1.000", "+1%")
    console().print(table)
    assert "forward" in capsys.readouterr().out
