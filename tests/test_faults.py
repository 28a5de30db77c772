"""What a run meets on a bad day: one clear line each, and every checkpoint stays as it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT
from trainings import Training

from mst_ds.checkpoint import STATE_FILE, newest_checkpoint, read_checkpoint
from mst_ds.checkpoint.export import export_run
from mst_ds.commands.train import main
from mst_ds.data import training_data
from mst_ds.data.tokenizer import byte_tokenizer

FLAGS = ("--seq_len", "256", "--preflight", "false", "--save_steps", "2")
GO_ON = ("--resume", "auto", "--max_steps", "6")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    training = Training(folder, *FLAGS, "--max_steps", "4", ranks=1)
    assert training.end(limit=300) == [0], training.output
    return folder


@pytest.fixture
def output_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@dataclass(frozen=True)
class Fault:
    """Happens to `checkpoints/step-00000004`, or lies in the flags that it returns; seen in the tokens alone, or before
    there are any."""

    name: str
    happens: Callable[[Path, Path], list[str]]
    says: str
    needs_tokens: bool = False


def _optimizer_file(checkpoint: Path) -> Path:
    return next((checkpoint / "states").glob("*optim_states.pt"))


def truncated(checkpoint: Path, other: Path) -> list[str]:
    os.truncate(_optimizer_file(checkpoint), 100)
    return []


def rank_file_missing(checkpoint: Path, other: Path) -> list[str]:
    (checkpoint / "random_states_rank_0.pt").unlink()
    return []


def state_missing(checkpoint: Path, other: Path) -> list[str]:
    (checkpoint / STATE_FILE).unlink()
    return []


def state_cut_off(checkpoint: Path, other: Path) -> list[str]:
    os.truncate(checkpoint / STATE_FILE, 50)
    return []


def foreign_state(checkpoint: Path, other: Path) -> list[str]:
    (checkpoint / STATE_FILE).write_text(json.dumps({"global_step": 4, "best_metric": None}), encoding="utf-8")
    return []


def other_model(checkpoint: Path, other: Path) -> list[str]:
    config = json.loads((checkpoint / "model" / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}), encoding="utf-8")
    byte_tokenizer().save_pretrained(other)
    return ["--model", str(other)]


def other_tokenizer(checkpoint: Path, other: Path) -> list[str]:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(other)
    return ["--tokenizer", str(other)]


def other_dtype(checkpoint: Path, other: Path) -> list[str]:
    ds_config = json.loads((ROOT / "ds_configs" / "zero3_mst.json").read_text(encoding="utf-8"))
    (other / "bf16.json").write_text(json.dumps(ds_config | {"bf16": {"enabled": True}}), encoding="utf-8")
    return ["--ds_config", str(other / "bf16.json")]


def other_stage(checkpoint: Path, other: Path) -> list[str]:
    return ["--ds_config", str(ROOT / "ds_configs" / "zero2_mst.json")]


def other_length(checkpoint: Path, other: Path) -> list[str]:
    return ["--seq_len", "512"]


def other_data(checkpoint: Path, other: Path) -> list[str]:
    (other / "text.txt").write_text("Call me Ishmael. " * 2000, encoding="utf-8")
    return ["--dataset", str(other / "text.txt")]


def adapters(checkpoint: Path, other: Path) -> list[str]:
    from peft import LoraConfig

    LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(str(other))
    return ["--peft_config", str(other)]


def fewer_steps(checkpoint: Path, other: Path) -> list[str]:
    return ["--max_steps", "3"]


def no_checkpoint(checkpoint: Path, other: Path) -> list[str]:
    return ["--resume", str(other)]


def no_such_folder(checkpoint: Path, other: Path) -> list[str]:
    return ["--resume", str(other / "step-00000004")]


def a_file_in_its_place(checkpoint: Path, other: Path) -> list[str]:
    (other / "checkpoints").write_text("", encoding="utf-8")
    return ["--output_dir", str(other)]


def a_broken_link_in_its_place(checkpoint: Path, other: Path) -> list[str]:
    (other / "checkpoints").symlink_to(other / "nowhere")
    return ["--output_dir", str(other)]


def other_rate(checkpoint: Path, other: Path) -> list[str]:
    return ["--learning_rate", "1e-5"]


def another_run(checkpoint: Path, other: Path) -> list[str]:
    shutil.copytree(checkpoint, other / "step-00000005")
    return ["--resume", str(other / "step-00000005")]


REFUSED = (
    Fault("truncated file", truncated, "has 100 of its"),
    Fault("missing rank file", rank_file_missing, "lacks its file random_states_rank_0.pt"),
    Fault("missing state", state_missing, "is no checkpoint: it has no state.json"),
    Fault("state cut off", state_cut_off, "state.json is damaged or not of mst_ds"),
    Fault("foreign state", foreign_state, "state.json is damaged or not of mst_ds"),
    Fault("other model", other_model, "was made with model.intermediate_size 384, but this run has 256"),
    Fault("other tokenizer", other_tokenizer, "was made with another tokenizer"),
    Fault("other dtype", other_dtype, "was made with dtype 'fp32', but this run has 'bf16'"),
    Fault("other ZeRO stage", other_stage, "was made with zero_stage 3, but this run has 2"),
    Fault("other seq_len", other_length, "was saved with seq_len 256", needs_tokens=True),
    Fault("other data", other_data, "the position in the data was saved with", needs_tokens=True),
    Fault("adapters where none were", adapters, "was made with peft"),
    Fault("other learning rate", other_rate, "was made with training.learning_rate 0.004, but this run has 1e-05"),
    Fault("another run's checkpoint", another_run, "has a checkpoint of step 4, which this run would overwrite"),
    Fault("fewer steps", fewer_steps, "max_steps is 3, but"),
    Fault("resume names no checkpoint", no_checkpoint, "is no checkpoint: it has no state.json"),
    Fault("resume names nothing", no_such_folder, "allowed: 'auto', or the folder of a checkpoint"),
    Fault("a file in place of the folder", a_file_in_its_place, "checkpoints is a file"),
    Fault(
        "a broken link in place of the folder", a_broken_link_in_its_place, "checkpoints is a link that leads nowhere"
    ),
)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("mst-train: error: ")]


@pytest.mark.parametrize("fault", REFUSED, ids=lambda fault: fault.name)
def test_what_is_refused_changes_nothing(
    output_dir: Path,
    tmp_path: Path,
    fault: Fault,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_early(*_: object) -> None:
        raise AssertionError("data is read for a run that is refused without it")

    if not fault.needs_tokens:
        monkeypatch.setattr(training_data, "load_documents", too_early)
    (tmp_path / "other").mkdir()
    flags = fault.happens(output_dir / "checkpoints" / "step-00000004", tmp_path / "other")
    before = contents(output_dir)
    assert main(["--output_dir", str(output_dir), *FLAGS, *GO_ON, *flags]) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert fault.says in line
    assert "allowed: " in line
    assert contents(output_dir) == before
    assert read_checkpoint(output_dir / "checkpoints" / "step-00000002").step == 2


def test_a_new_run_does_not_overwrite_another(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(output_dir)
    assert main(["--output_dir", str(output_dir), *FLAGS]) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert "output_dir has a checkpoint of step 4, which this run would overwrite; allowed: --resume auto" in line
    assert contents(output_dir) == before


@pytest.mark.parametrize("flags", [(), GO_ON], ids=["from the beginning", "or going on"])
def test_a_new_run_does_not_replace_a_model(
    output_dir: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    """A run without checkpoints leaves only what it was for."""
    shutil.rmtree(output_dir / "checkpoints")
    for name in ("model", "summary.json"):
        before = contents(output_dir)
        assert main(["--output_dir", str(output_dir), *FLAGS, *flags]) == 2
        (line,) = error_lines(capsys.readouterr().err)
        assert f"output_dir has the {name} of a run that is done, which this run would overwrite" in line
        assert contents(output_dir) == before
        shutil.rmtree(output_dir / name, ignore_errors=True)


@pytest.mark.parametrize(
    ("has_checkpoint", "says"),
    [(True, r"no room; the run's work is in .*step-00000004, of which"), (False, "no room; .* its work is lost")],
)
def test_a_model_that_cannot_be_written(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch, has_checkpoint: bool, says: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("mst_ds.checkpoint.export.export_model", fail)
    if not has_checkpoint:
        shutil.rmtree(output_dir / "checkpoints")
    engine: Any = None
    with pytest.raises(OSError, match=says):
        export_run(engine, byte_tokenizer(), output_dir, source="small_llama", merge_adapter=False, whole=None)


def test_a_checkpoint_with_a_flipped_bit_is_not_loaded(output_dir: Path) -> None:
    file = _optimizer_file(output_dir / "checkpoints" / "step-00000004")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    before = contents(output_dir / "checkpoints")
    training = Training(output_dir, *FLAGS, *GO_ON, ranks=1)
    assert training.end() == [1]
    (line,) = error_lines(training.output)
    assert "rank 0: the checkpoint's file" in line
    assert "optim_states.pt is not as it was written; allowed: an earlier checkpoint" in line
    assert "Traceback" not in training.output
    assert contents(output_dir / "checkpoints") == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for two checkpoints and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can make a small disk, and not in every container")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_leaves_the_checkpoints_before_it(finished: Path, small_disk: Path) -> None:
    run = Path(shutil.copytree(finished, small_disk / "run"))
    free = shutil.disk_usage(small_disk).free
    with (small_disk / "filler").open("wb") as filler:
        filler.write(b"\0" * (free - 2_000_000))
    before = contents(run / "checkpoints")
    training = Training(run, *FLAGS, *GO_ON, ranks=1)
    assert training.end() == [1]
    (line,) = error_lines(training.output)
    assert "step-00000006 could not be written" in line
    assert "Traceback" not in training.output
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    assert newest.step == 4
    assert before.items() <= contents(run / "checkpoints").items()
    (small_disk / "filler").unlink()
    again = Training(run, *FLAGS, *GO_ON, ranks=1)
    assert again.end() == [0], again.output


def test_a_disk_that_is_read_only(finished: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(finished, small_disk / "run"))
    before = contents(run)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main(["--output_dir", str(run), *FLAGS, *GO_ON]) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert "output_dir" in line
    assert contents(run) == before
