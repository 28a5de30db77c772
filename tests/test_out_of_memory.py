"""When memory runs out: which phase it was, what the plan has in it, what to change; in one line."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mst_ds import GIB, Plan, make_plan
from mst_ds.memory.out_of_memory import OutOfMemoryError, during, explanation
from mst_ds.planner import MemoryTerm, Phase
from mst_ds.training import loop

CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


def plan_of(device_memory: int = 80 * GIB, seq_len: int = 2**20, **mst: Any) -> Plan:
    ds_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}, "mst": mst}
    arguments: dict[str, Any] = {"world_size": 8, "sp_size": 8, "seq_len": seq_len, "device_memory": device_memory}
    return make_plan("meta-llama/Llama-3.1-8B", ds_config, **arguments)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_MESSAGE)])
def test_torchs_error_gets_the_phase(error: Exception) -> None:
    with (
        pytest.raises(OutOfMemoryError, match="out of memory in the forward or loss") as found,
        during("forward", "loss"),
    ):
        raise error
    assert found.value.phases == ("forward", "loss")
    assert found.value.__cause__ is error


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), during("backward"):
        raise RuntimeError("shapes differ")


OFFLOADED = {"offload_activations": True, "mlp_chunks": 64, "loss_chunks": 256}
CASES = {
    "mlp": ("backward", {"mlp_chunks": 1, "recompute": True, "offload_activations": True}, "a larger mlp_chunks"),
    "loss": ("loss", {"loss_chunks": 1, "recompute": True}, "a larger loss_chunks"),
    "kept": ("forward", {"recompute": True, "keep_attention": True}, "offload_activations true"),
    "everything": (
        "forward",
        {"recompute": False, "keep_mlp": False},
        "recompute true in the 'mst' block",
    ),
    "gate and up": ("forward", {"keep_mlp": True}, "keep_mlp false in the 'mst' block"),
    "states": ("optimizer_step", {}, "a higher ZeRO stage, more ranks, or offload_optimizer"),
    **{
        f"a layer, in the {phase}, of {chunks}": (phase, {"seq_len": 2**23, "layer_chunks": chunks} | OFFLOADED, remedy)
        for phase in ("forward", "backward")
        # What is left of many chunks is whole.
        for chunks, remedy in ((1, "a larger layer_chunks"), (64, "a larger sp_size"))
    },
}


@pytest.mark.parametrize(("phase", "mst", "remedy"), CASES.values(), ids=CASES)
def test_the_setting_follows_from_the_largest_term(phase: str, mst: dict[str, Any], remedy: str) -> None:
    plan = plan_of(**mst)
    line = explanation(OutOfMemoryError([phase]), plan)
    assert "\n" not in line
    assert line.startswith(f"ran out of memory in the {phase}, ")
    (planned,) = (each for each in plan.phases if each.name == phase)
    largest = max((term for term in planned.terms if term.place == "device"), key=lambda term: term.bytes)
    assert f"{planned.device_bytes / GIB:.2f} of 80.00 GiB, of these {largest.name} {largest.bytes / GIB:.2f}, " in line
    assert f"allowed: {remedy}" in line


def test_what_is_in_flight_is_on_the_host_already() -> None:
    names = ("layer_inputs_in_flight", "attention_gradients", "gathered_parameters")
    terms = tuple(MemoryTerm(name, GIB * (10 - place), "device", ()) for place, name in enumerate(names))
    line = explanation(
        OutOfMemoryError(["backward"]), replace(plan_of(recompute=True), phases=(Phase("backward", terms),))
    )
    assert "allowed: a larger layer_chunks in the 'mst' block" in line


def test_of_two_phases_it_is_the_one_that_needs_more() -> None:
    assert "in the loss" in explanation(OutOfMemoryError(["forward", "loss"]), plan_of(loss_chunks=1))


def test_it_says_whether_the_plan_had_known() -> None:
    error = OutOfMemoryError(["backward"])
    assert "more than the plan has; a larger reserve_gib" in explanation(error, plan_of(recompute=True))
    assert "as the plan said it would" in explanation(error, plan_of(device_memory=GIB))


def failing(name: str) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(f"CUDA out of memory in {name}")

    return fail


@pytest.mark.parametrize(
    ("where", "phases"),
    [("forward", ("forward", "loss")), ("backward", ("backward",)), ("step", ("optimizer_step",))],
)
@pytest.mark.usefixtures("group_of_one")
def test_a_step_says_in_which_phase(where: str, phases: tuple[str, ...]) -> None:
    output = SimpleNamespace(loss=torch.zeros(()))
    calls: dict[str, Any] = {
        "forward": lambda **_: output,
        "backward": lambda *_, **__: None,
        "step": lambda: None,
        where: failing(where),
    }

    class Engine:
        device = torch.device("cpu")
        module = torch.nn.Identity()
        __call__ = staticmethod(calls["forward"])
        backward, step = staticmethod(calls["backward"]), staticmethod(calls["step"])
        train = staticmethod(lambda: None)
        is_gradient_accumulation_boundary = staticmethod(lambda: True)
        zero_optimization_stage = staticmethod(lambda: 3)

    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "shift_labels": torch.ones(1, 4, dtype=torch.long)}
    engine: Any = Engine()
    with pytest.raises(OutOfMemoryError) as found:
        loop.train_step(engine, [batch])
    assert found.value.phases == phases
