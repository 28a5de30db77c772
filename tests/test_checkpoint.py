"""What is refused to go on from: one clear line each, and every earlier checkpoint stays as it is."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig

from mst_ds.checkpoint import (
    STATE_FILE,
    Identity,
    load_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
    universal_setting,
)
from mst_ds.data.tokenizer import byte_tokenizer
from mst_ds.export import export_checkpoint

DATA = {"samples_seen": 7, "seed": 3}


def identity_of(config: Any, stage: int, **changes: Any) -> Identity:
    given: dict[str, Any] = {"dtype": "fp32", "zero_stage": stage, "training": {"seed": 3}}
    return Identity.of(config, None, byte_tokenizer(), **given | changes)


def make_engine(model: Any, stage: int, checkpoint: Any = None, world_size: int = 1) -> Any:
    import deepspeed

    from mst_ds.jit_build import build_shared_memory_collective

    build_shared_memory_collective()
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        **universal_setting(checkpoint, world_size),
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": 0.5},
        {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    return deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=ds_config)[0]


def step(engine: Any, seed: int) -> float:
    ids = torch.randint(5, 60, (1, 32), generator=torch.Generator().manual_seed(seed))
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return float(loss)


def save_two(rank: int, folder: Path, stage: int) -> list[float]:
    """Steps 1 and 2 are saved; the losses of the steps that follow."""
    engine = make_engine(tiny_llama(), stage)
    for number in (1, 2):
        step(engine, number)
        _save(engine, folder, number, stage)
    return [step(engine, number) for number in (3, 4)] + draws()


def draws() -> list[float]:
    """The next number of each generator."""
    return [random.random(), np.random.rand(), torch.rand(()).item()]


def _save(engine: Any, folder: Path, number: int, stage: int, keep: int = 2) -> Path:
    return save_checkpoint(
        engine,
        folder,
        step=number,
        keep=keep,
        identity=identity_of(engine.module.config, stage),
        data=DATA,
        tokenizer=byte_tokenizer(),
    )


def go_on(rank: int, folder: Path, stage: int, world_size: int) -> list[float]:
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.data) == (2, DATA)
    torch.manual_seed(1)
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    engine = make_engine(model, stage, checkpoint, world_size)
    load_checkpoint(engine, checkpoint, seed=0)
    return [step(engine, number) for number in (3, 4)] + draws()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("run") / "checkpoints"
    run_ranks(save_two, 2, folder, 2)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_goes_on(tmp_path: Path, stage: int) -> None:
    expected = run_ranks(save_two, 2, tmp_path / "checkpoints", stage)
    assert run_ranks(go_on, 2, tmp_path / "checkpoints", stage, 2) == expected
    # Every rank has the same batch, so that one rank computes what two did, but for the order of sums.
    (alone,) = run_ranks(go_on, 1, tmp_path / "checkpoints", stage, 1)
    assert alone[:2] == pytest.approx(expected[0][:2], abs=1e-5)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run_ranks(save_many, 1, folder)
    assert sorted(os.listdir(folder)) == ["step-00000003", "step-00000004"]


def save_many(rank: int, folder: Path) -> None:
    engine = make_engine(tiny_llama(), 1)
    for number in (1, 2, 3, 4):
        # What a save that was killed has left is removed by the next.
        (folder / f"step-{number:08d}.partial").mkdir(parents=True)
        _save(engine, folder, number, 1)


def damage_size(folder: Path) -> None:
    with next((folder / "states").glob("*optim_states.pt")).open("r+b") as file:
        file.truncate(100)


def damage_rank(folder: Path) -> None:
    sorted((folder / "states").glob("*optim_states.pt"))[1].unlink()


def damage_state(folder: Path) -> None:
    (folder / STATE_FILE).write_text('{"step": 2', encoding="utf-8")


def damage_fields(folder: Path) -> None:
    (folder / STATE_FILE).write_text('{"step": 2}', encoding="utf-8")


def damage_all(folder: Path) -> None:
    (folder / STATE_FILE).unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_size, r"optim_states\.pt has 100 of its \d+ bytes"),
        (damage_rank, r"lacks its file states/.*optim_states\.pt"),
        (damage_state, "is damaged or not of mst_ds"),
        (damage_fields, "is damaged or not of mst_ds"),
        (damage_all, r"is no checkpoint: it has no state\.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused(copied: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(copied / "step-00000002")
    with pytest.raises(ValueError, match=says) as error:
        newest_checkpoint(copied)
    assert "\n" not in str(error.value)
    assert "allowed: " in str(error.value)
    assert read_checkpoint(copied / "step-00000001").step == 1


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no checkpoint"):
        read_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path / "missing") is None
    (tmp_path / "step-00000005.partial").mkdir()
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"zero_stage": 3}, "zero_stage 2, but this run has 3"),
        ({"dtype": "bf16"}, "dtype 'fp32', but this run has 'bf16'"),
        ({"model": {"hidden_size": 128}}, r"model\.hidden_size 48, but this run has 128"),
        ({"peft": LoraConfig(r=4)}, r"peft\."),
        ({"training": {"seed": 4}}, r"training\.seed 3, but this run has 4"),
        ({"tokenizer": "<extra>"}, "another tokenizer"),
    ],
)
def test_another_run_is_refused(saved: Path, changes: dict[str, Any], says: str) -> None:
    config, tokenizer = tiny_llama().config, byte_tokenizer()
    for name, value in changes.get("model", {}).items():
        setattr(config, name, value)
    if "tokenizer" in changes:
        tokenizer.add_tokens([changes["tokenizer"]])
    saved_as = {"dtype": "fp32", "zero_stage": 2, "training": {"seed": 3}}
    given = {name: changes.get(name, value) for name, value in saved_as.items()}
    identity = Identity.of(config, changes.get("peft"), tokenizer, **given)
    checkpoint = read_checkpoint(saved / "step-00000002")
    with pytest.raises(ValueError, match=says) as error:
        identity.require_same(checkpoint.identity, checkpoint.folder)
    assert "\n" not in str(error.value)


def test_the_same_run_is_not_refused(saved: Path) -> None:
    checkpoint = read_checkpoint(saved / "step-00000002")
    identity_of(tiny_llama().config, 2).require_same(checkpoint.identity, checkpoint.folder)


def fill_disk(rank: int, folder: Path) -> str:
    """A file may have no more bytes than a limit of the system's says, as on a disk that is full."""
    engine = make_engine(tiny_llama(), 1)
    _save(engine, folder, 1, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        _save(engine, folder, 2, 1)
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "it was written"


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    (message,) = run_ranks(fill_disk, 1, tmp_path)
    assert "step-00000002 could not be written" in message
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 1


def save_model(rank: int, folder: Path, stage: int, has_adapters: bool) -> torch.Tensor:
    """The logits of what is saved."""
    model: Any = tiny_llama()
    if has_adapters:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    engine = make_engine(model, stage)
    for number in (1, 2):
        step(engine, number)
    _save(engine, folder, 2, stage)
    engine.eval()
    with torch.no_grad():
        return engine(input_ids=torch.arange(5, 37)[None]).logits


@pytest.mark.parametrize("has_adapters", [False, True])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_export_gives_the_trained_models_logits(tmp_path: Path, stage: int, has_adapters: bool) -> None:
    expected = run_ranks(save_model, 2, tmp_path / "checkpoints", stage, has_adapters)[0]
    checkpoint = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    export_checkpoint(checkpoint, tmp_path / "model")
    if has_adapters:
        from peft import PeftModel

        model: Any = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "model"))
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert isinstance(model.config, LlamaConfig)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=torch.arange(5, 37)[None]).logits, expected, rtol=0, atol=0)


def test_state_names_every_file(saved: Path) -> None:
    folder = saved / "step-00000002"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["sizes"].keys() == files - {STATE_FILE}
