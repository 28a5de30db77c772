"""launch/export.py: a checkpoint becomes a folder that others load, without any of what trained it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kept_models import BIAS, ROUTER, save_kept_model
from processes import ROOT
from safetensors.torch import load_file
from trainings import Training, assert_same_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from mst_ds.checkpoint import read_checkpoint
from mst_ds.commands.export import main

FLAGS = ("--max_steps", "3", "--save_steps", "2", "--seq_len", "256", "--preflight", "false", "--learning_rate", "1e-3")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run on two ranks: its last checkpoint is what its `model` was made of.

    Beside it stands what it was trained from, a model in bf16 with tensors in fp32, tied embeddings and two ends.
    """
    folder = tmp_path_factory.mktemp("runs") / "run"
    source = save_kept_model("ernie4.5-moe", folder.with_name("source"))
    (source / "generation_config.json").write_text('{"eos_token_id": [256, 3]}', encoding="utf-8")
    ds_config = folder.with_name("ds_config.json")
    ds_config.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}), encoding="utf-8")
    training = Training(folder, *FLAGS, "--model", str(source), "--ds_config", str(ds_config))
    assert training.end(limit=300) == [0, 0], training.output
    return folder


def test_the_newest_checkpoint_of_a_run(run: Path, tmp_path: Path) -> None:
    """In a process of its own, as on a machine that has only the files."""
    command = [sys.executable, "launch/export.py", str(run), str(tmp_path / "model")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "step 3" in done.stdout
    assert_same_weights(tmp_path, run)
    written, exported = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (run / "model", tmp_path / "model")
    )
    assert exported == written
    assert "config.json" in written
    assert json.loads(written["generation_config.json"]) == {"eos_token_id": [256, 3]}
    state, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", run.parent / "source"))
    assert "lm_head.weight" not in state
    assert state.keys() == source.keys()
    # In the run, too, nothing trains a router's bias.
    (bias,) = (name for name in state if name.endswith(BIAS))
    assert state[bias].equal(source[bias])
    assert {name for name, tensor in state.items() if tensor.dtype == torch.float32} == {bias, ROUTER}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("def main(", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(run / "model")(ids).logits
        assert model(ids).logits.equal(expected)


def test_one_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run / "checkpoints" / "step-00000002"), str(tmp_path / "model")]) == 0
    assert "step 2" in capsys.readouterr().out
    # A step before the last: other weights.
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path, run)


@pytest.mark.parametrize("case", ["inside", "here"])
def test_a_place_that_is_refused(
    run: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = run / "checkpoints" / "step-00000003"
    place = str(checkpoint / "model" / "new") if case == "inside" else "."
    assert main([str(run), place]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert {"inside": "is in the checkpoint", "here": "or where you are"}[case] in line
    assert read_checkpoint(checkpoint).step == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["no checkpoint", "not empty", "cut off", "flipped"])
def test_what_is_refused(run: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "run", tmp_path / "model"
    says = {"no checkpoint": "is no checkpoint", "not empty": "is not empty", "cut off": "has 100 of its"}
    says |= {"flipped": "is not as it was written"}
    if case != "no checkpoint":
        shutil.copytree(run, source)
    if case == "not empty":
        target.mkdir()
        (target / "notes.txt").write_text("mine", encoding="utf-8")
    if case in ("cut off", "flipped"):
        file = next((source / "checkpoints" / "step-00000003").rglob("*optim_states.pt"))
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data[:100] if case == "cut off" else data)
    assert main([str(source), str(target)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mst-export: error: ")
    assert says[case] in line
    assert not target.exists() or [path.name for path in target.iterdir()] == ["notes.txt"]
