"""What is refused to go on from: one clear line each, and every earlier checkpoint stays as it is."""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DATA, draws, identity_of, resumable, rewrite_state, save, save_two, step
from distributed import run_ranks
from peft import LoraConfig, get_peft_model
from steps import build_engine
from tiers import slow_but_for
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig, get_scheduler

from mst_ds.checkpoint import (
    STATE_FILE,
    Identity,
    load_checkpoint,
    newest_checkpoint,
    only_states,
    read_checkpoint,
)
from mst_ds.checkpoint.export import export_checkpoint
from mst_ds.checkpoint.random_states import seed_generators
from mst_ds.data.tokenizer import byte_tokenizer


def go_on(rank: int, folder: Path, stage: int, world_size: int) -> list[float]:
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.data) == (2, DATA)
    torch.manual_seed(1)
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    engine = build_engine(model, **resumable(stage, checkpoint, world_size))
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


@pytest.mark.parametrize("stage", slow_but_for([3], range(4)))
def test_training_goes_on(tmp_path: Path, stage: int) -> None:
    expected = run_ranks(save_two, 2, tmp_path / "checkpoints", stage)
    assert run_ranks(go_on, 2, tmp_path / "checkpoints", stage, 2) == expected
    # Every rank has the same batch, so that one rank computes what two did, but for the order of sums.
    (alone,) = run_ranks(go_on, 1, tmp_path / "checkpoints", stage, 1)
    assert alone[:2] == pytest.approx(expected[0][:2], abs=1e-5)
    # What was converted on the way is gone; what a kill in the middle of that leaves is no obstacle.
    used = tmp_path / "checkpoints" / "step-00000002"
    assert not [name for name in os.listdir(used) if "universal" in name]
    (used / "universal").mkdir()
    (used / "latest_universal").touch()
    assert read_checkpoint(used).step == 2


def resume_with_another_schedule(rank: int, folder: Path, stage: int, is_deepspeeds: bool) -> None:
    """What four steps were planned for goes on to six of eight, with the rates that eight have from the start."""

    def engine_for(steps: int) -> Any:
        if is_deepspeeds:
            params = {"total_num_steps": steps, "warmup_max_lr": 1e-2, "warmup_num_steps": 2}
            kind: dict[str, Any] = {"scheduler": {"type": "WarmupDecayLR", "params": params}}
        else:
            kind = {
                "schedule": functools.partial(get_scheduler, "linear", num_training_steps=steps, num_warmup_steps=1)
            }
        return build_engine(tiny_llama(), **resumable(stage), gradient_clipping=1.0 / steps, **kind)

    def rates(engine: Any, numbers: range) -> list[list[float]]:
        found = []
        for number in numbers:
            found.append(engine.get_lr())
            step(engine, number)
        return found

    expected = rates(engine_for(8), range(1, 7))
    first = engine_for(4)
    rates(first, range(1, 5))
    save(first, folder, 4, stage)
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None
    second = engine_for(8)
    load_checkpoint(second, checkpoint, seed=0)
    assert second.lr_scheduler.get_last_lr() == second.get_lr()
    assert rates(second, range(5, 7)) == expected[4:]
    assert stage == 0 or second.optimizer.clip_grad == 1.0 / 8


@pytest.mark.parametrize(("stage", "is_deepspeeds"), [(0, False), (1, True), (3, False)])
def test_another_schedule_is_that_from_the_first_step_on(tmp_path: Path, stage: int, is_deepspeeds: bool) -> None:
    run_ranks(resume_with_another_schedule, 1, tmp_path / "checkpoints", stage, is_deepspeeds)


def resume_with_torchs_schedule(rank: int, folder: Path) -> None:
    def go_on(engine: Any) -> list[tuple[float, float]]:
        return [(engine.get_lr()[0], step(engine, number)) for number in (4, 5, 6)]

    settings = {"scheduler": {"type": "StepLR", "params": {"step_size": 2}}}
    first = build_engine(tiny_llama(), **resumable(0), **settings)
    for number in (1, 2, 3):
        step(first, number)
    save(first, folder, 3, 0)
    second = build_engine(tiny_llama(), **resumable(0), **settings)
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None
    load_checkpoint(second, checkpoint, seed=0)
    assert go_on(second) == go_on(first)


def test_a_schedule_of_torch_goes_on(tmp_path: Path) -> None:
    run_ranks(resume_with_torchs_schedule, 1, tmp_path / "checkpoints")


def test_the_newest_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run_ranks(save_many, 1, folder)
    assert sorted(os.listdir(folder)) == ["step-00000003", "step-00000004"]


def save_many(rank: int, folder: Path) -> None:
    engine = build_engine(tiny_llama(), **resumable(1))
    moved = folder.with_name("moved")
    for number in (1, 2, 3, 4):
        # What a save that was killed has left is removed by the next.
        (folder / f"step-{number:08d}.partial").mkdir(parents=True)
        save(engine, folder, number, 1)
        if number == 1:
            # Of a checkpoint that was moved to another disk the link goes, and one that leads nowhere is no obstacle.
            (folder / "step-00000001").replace(moved)
            (folder / "step-00000001").symlink_to(moved)
            (folder / "step-00000002").symlink_to(moved / "missing")
    assert read_checkpoint(moved).step == 1


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


def damage_another(folder: Path) -> None:
    """DeepSpeed takes its files by a pattern."""
    (folder / "states" / "zero_pp_rank_2_mp_rank_00_optim_states.pt").touch()


def damage_link(folder: Path) -> None:
    (folder / "states").rename(folder.parent / "states")
    (folder / "states").symlink_to(folder.parent / "states")


def damage_linked(folder: Path) -> None:
    (folder / "states" / "more").symlink_to(folder.parent / "step-00000001" / "states")


def damage_number(folder: Path) -> None:
    text = (folder / STATE_FILE).read_text(encoding="utf-8")
    (folder / STATE_FILE).write_text(text.replace('"samples_seen": 7', '"samples_seen": 77'), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_another, r"rank_2_mp_rank_00_optim_states\.pt is not of the checkpoint"),
        (damage_link, r"lacks its file states/"),
        (damage_linked, "states/more is not of the checkpoint"),
        (damage_number, "it is not as it was written"),
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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.update(step="2"), "step is '2'"),
        (lambda state: state.update(step=True), "step is True"),
        (lambda state: state.update(world_size=0), "world_size is 0"),
        (lambda state: state.update(data=[7, 3]), r"data is \[7, 3\]"),
        (lambda state: state.update(sizes=list(state["sizes"])), r"sizes is \['"),
        (lambda state: state["sizes"].update({"../../passwd": 5}), r"sizes is {.*"),
        (lambda state: state["sizes"].update({"/etc/passwd": 5}), "sizes is {"),
        (lambda state: state["sizes"].update({"states/\0": 5}), "sizes is {"),
        (lambda state: state.update(eval_loss=float("nan")), "eval_loss is nan"),
        (lambda state: state["checksums"].popitem(), "sizes and checksums are not of the same files"),
        (lambda state: state["identity"].update(dtype="fp8"), r"identity\.dtype is 'fp8'"),
        (lambda state: state["identity"].update(dtype=["fp32"]), r"identity\.dtype is \['fp32'\]"),
        (lambda state: state["identity"].update(zero_stage=4), r"identity\.zero_stage is 4"),
        (lambda state: state["identity"].pop("peft"), "identity is {"),
        (lambda state: state.pop("data"), "it has no data"),
    ],
)
def test_a_state_that_cannot_be_is_refused(copied: Path, change: Callable[[dict[str, Any]], object], says: str) -> None:
    rewrite_state(copied / "step-00000002", change)
    with pytest.raises(ValueError, match=says) as error:
        newest_checkpoint(copied)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("text", ["[" * 10**5, "[]", "7", '{"step": 2}', "\0", '{"checksum": 1e999}'])
def test_a_state_that_is_none_is_refused(copied: Path, text: str) -> None:
    (copied / "step-00000002" / STATE_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="is damaged or not of mst_ds"):
        newest_checkpoint(copied)


def test_generators_that_begin_anew_have_numbers_of_their_own() -> None:
    numbers = []
    for seed, number, rank in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)):
        seed_generators(seed, number, rank)
        numbers += draws()
    assert len(set(numbers)) == len(numbers)


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
        (
            {"training": {"seed": 3, "optimizer": {"params": {"lr": 1e-3}}}},
            r"training\.optimizer\.params\.lr None, but this run has 0\.001",
        ),
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


def fill_disk(rank: int, folder: Path, *, at: str) -> str:
    """A file may have no more bytes than a limit of the system's says, as on a disk that is full."""
    from mst_ds.checkpoint import save as module

    engine = build_engine(tiny_llama(), **resumable(1))
    save(engine, folder, 1, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = getattr(module, at)

    def write_on_full_disk(*args: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4, before[1]))
        return write(*args)

    setattr(module, at, write_on_full_disk)
    try:
        save(engine, folder, 2, 1)
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        setattr(module, at, write)
    return "it was written"


# torch, the tokenizer and safetensors each say it in an error of their own.
@pytest.mark.parametrize("at", ["random_states", "write_files_of", "save_file"])
def test_a_disk_that_is_full(tmp_path: Path, at: str) -> None:
    (message,) = run_ranks(functools.partial(fill_disk, at=at), 1, tmp_path)
    assert "step-00000002 could not be written" in message
    assert re.search(r"; \d+ bytes are free there$", message)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 1


def save_model(rank: int, folder: Path, stage: int, has_adapters: bool) -> torch.Tensor:
    """The logits of what is saved."""
    model: Any = tiny_llama()
    if has_adapters:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    engine = build_engine(model, **resumable(stage))
    for number in (1, 2):
        step(engine, number)
    save(engine, folder, 2, stage)
    engine.eval()
    with torch.no_grad():
        return engine(input_ids=torch.arange(5, 37)[None]).logits


@pytest.mark.parametrize("has_adapters", [False, True])
@pytest.mark.parametrize("stage", slow_but_for([3], [0, 2, 3]))
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


def test_a_refusal_is_explained_beside_a_damaged_file(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "1.pt")
    (tmp_path / "1.pt").write_bytes((tmp_path / "1.pt").read_bytes()[:-30])
    torch.save({"a": Path("any class")}, tmp_path / "2.pt")
    with pytest.raises(OSError, match=r"2\.pt holds pathlib\.\S+, which is no state"), only_states(tmp_path):
        torch.load(tmp_path / "2.pt")


def test_state_names_every_file(saved: Path) -> None:
    folder = saved / "step-00000002"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["sizes"].keys() == files - {STATE_FILE}
