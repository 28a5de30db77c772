"""Planned against measured memory: what a phase took, which rank is shown, when there is a warning."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed import run_ranks
from peft import LoraConfig, get_peft_model
from tiny import samples, tiny_llama
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_ds import GIB, make_plan
from mst_ds.memory.phases import PhaseMemory, PhaseMeter, compare, planned_bytes
from mst_ds.planner import MemoryTerm, Phase

CPU = torch.device("cpu")
FLOATS = 2**18  # of 4 bytes: 1 MiB


class Decoder(nn.Module):
    def forward(self, mebibytes: int) -> Tensor:
        del mebibytes  # the hook below sees it
        return torch.zeros(FLOATS)


class Model(nn.Module):
    """With what `PhaseMeter` asks of a model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Decoder()


def allocate(mebibytes: int) -> None:
    torch.zeros(mebibytes * FLOATS)


def test_on_the_cpu_a_phase_took_what_stood_before_and_what_was_made() -> None:
    standing, model = torch.zeros(FLOATS), Model()
    with PhaseMeter(model, CPU) as meter:
        allocate(5)
        hidden_states = model.base_model(1)
        allocate(3)
        meter.end("loss")
        del hidden_states
        allocate(2)
        meter.end("backward")
    allocate(9)
    assert meter.peaks["initialisation"] >= standing.nbytes
    above = {phase: peak - meter.peaks["initialisation"] for phase, peak in meter.peaks.items()}
    assert above == {"initialisation": 0, "forward": 5 * 2**20, "loss": 4 * 2**20, "backward": 2 * 2**20}


def test_of_several_micro_batches_the_largest_counts() -> None:
    with PhaseMeter(Model(), CPU) as meter:
        for mebibytes in (1, 4, 2):
            allocate(mebibytes)
            meter.end("backward")
    assert meter.peaks["backward"] - meter.peaks["initialisation"] == 4 * 2**20


def test_the_end_of_a_measured_step_leaves_no_hook_and_no_mode() -> None:
    model = Model()
    with pytest.raises(RuntimeError, match="in the step"), PhaseMeter(model, CPU) as meter:
        raise RuntimeError("in the step")
    model.base_model(1)
    assert meter.peaks.keys() == {"initialisation"}
    made = torch.zeros(FLOATS)
    with PhaseMeter(model, CPU) as second:
        second.end("loss")
    assert second.peaks["loss"] == second.peaks["initialisation"] >= made.nbytes
    assert torch._C._len_torch_dispatch_stack() == 0


def standing_bytes() -> int:
    with PhaseMeter(Model(), CPU) as meter:
        return meter.peaks["initialisation"]


def test_what_stands_counts_each_storage_once_and_no_fake_tensor() -> None:
    gc.collect()
    before = standing_bytes()
    held: list[Tensor] = [torch.zeros(FLOATS)]
    held += [held[0][1:], held[0].detach(), nn.Parameter(held[0]), torch.zeros(FLOATS, device="meta")]
    with FakeTensorMode():
        held.append(torch.zeros(FLOATS))
    assert standing_bytes() - before == held[0].nbytes


def test_the_decoder_of_an_adapted_model_ends_the_forward() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids = samples(1, 8)["input_ids"]
    with PhaseMeter(model, CPU) as meter:
        model(input_ids=ids)
    assert meter.peaks["forward"] > meter.peaks["initialisation"]


class Allocator:
    """An accelerator's: reports the highest of what was taken since the last reset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.live = self.peak = 0
        monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", self.reset)

    def reset(self, device: torch.device) -> None:
        self.peak = self.live

    def take(self, count: int, *, keep: int = 0) -> None:
        self.peak = max(self.peak, self.live + count)
        self.live += keep


def test_on_an_accelerator_each_phase_has_a_peak_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, model = Allocator(monkeypatch), Model()
    allocator.take(50, keep=10)
    with PhaseMeter(model, torch.device("cuda", 0)) as meter:
        allocator.take(7, keep=2)
        model.base_model(1)
        allocator.take(3)
        meter.end("loss")
        allocator.take(20)
        meter.end("backward")
        meter.end("optimizer_step")
    assert meter.peaks == {"initialisation": 50, "forward": 17, "loss": 15, "backward": 32, "optimizer_step": 12}


def phase_of(name: str, device: int, host: int = 0, reserve: int = 0) -> Phase:
    places: list[tuple[str, int, Any]] = [("a", device, "device"), ("b", host, "host"), ("c", 1000, "nvme")]
    terms = tuple(MemoryTerm(term, count, place, ()) for term, count, place in places)
    return Phase(name, (*terms, MemoryTerm("d", reserve, "device", (), "reserve")))


def test_what_is_planned_is_without_the_reserve_and_on_the_cpu_with_the_host() -> None:
    phase = phase_of("forward", device=100, host=30, reserve=7)
    assert planned_bytes(phase, torch.device("cuda", 0)) == 100
    assert planned_bytes(phase, CPU) == 130


def compare_on_ranks(rank: int) -> list[PhaseMemory]:
    # Rank 1 plans for less: of the forward it is closer to its plan than rank 0, though it takes less.
    forward, backward = ((100, 400), (50, 300))[rank]
    phases = (phase_of("forward", forward), phase_of("loss", 5), phase_of("backward", backward))
    plan = make_plan("small_llama", {}, world_size=2, seq_len=32, device_memory=GIB, rank=rank)
    measured = ({"forward": 90, "backward": 500}, {"forward": 60, "backward": 310})[rank]
    return compare(replace(plan, phases=phases), measured, CPU)


def test_the_rank_that_exceeds_its_own_plan_most_is_shown_on_every_rank() -> None:
    expected = [PhaseMemory("forward", 50, 60), PhaseMemory("backward", 400, 500)]
    assert run_ranks(compare_on_ranks, 2) == [expected, expected]


@pytest.mark.parametrize(("measured", "warns"), [(5, False), (10, False), (11, False), (11.2, True), (15, True)])
def test_more_than_a_tenth_above_the_plan_is_a_warning(measured: float, warns: bool) -> None:
    warning = PhaseMemory("backward", 10 * GIB, int(measured * GIB)).warning
    assert (warning is not None) == warns
    if measured == 15:
        assert warning == (
            "warning: the backward took 15.000 GiB, 50% more than planned; "
            "raise reserve_gib in the 'mst' block by 5.000"
        )


def test_where_nothing_was_planned_anything_is_a_warning() -> None:
    assert PhaseMemory("initialisation", 0, 0).warning is None
    assert PhaseMemory("initialisation", 0, GIB).warning is not None
