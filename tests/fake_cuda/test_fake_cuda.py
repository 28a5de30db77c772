"""Patched models on fake CUDA tensors: what a GPU would be asked to do, seen without one.

Fake tensors have a device, a dtype and a shape, and no values. `fake_process.py` runs `fake_step.py` in a process that
takes itself to have a GPU; `fake_cases.py` is the table of what is run and what is expected.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch
from fake_cases import (
    CASES,
    CLEAN,
    DOCUMENTS,
    EXPERTS,
    FAULTS,
    FEW,
    LAUNCHES,
    LAUNCHES_OF_A_DOCUMENT,
    MANY,
    MODELS,
    WAITS_OF_A_LAYER,
)
from fake_process import compiler, run
from tiers import slow_but_for

QUICK = ["llama, plain", *(f"{model}, offload sp 8 packed" for model in MODELS)]


@functools.cache
def _run(is_quick: bool) -> dict[str, dict[str, Any]]:
    """All cases of a tier in one process."""
    return run([name for name in CASES if (name in CLEAN and name not in QUICK) != is_quick])


def found(case: str) -> dict[str, Any]:
    if not sys.platform.startswith("linux") or torch.backends.cuda.is_built():
        pytest.skip("only a CPU build of torch on Linux can be made to believe in a GPU")
    if compiler() is None:
        pytest.skip("no C++ compiler (c++, or what CXX names): the stand-in for a GPU cannot be compiled")
    return _run(case not in CLEAN or case in QUICK)[case]


@pytest.mark.parametrize("case", slow_but_for(QUICK, CLEAN))
def test_a_step_is_clean(case: str) -> None:
    """No devices mixed, no waiting for the device, no S x S scores; gradients in the parameters' dtype, beside them."""
    result = found(case)
    assert (result["errors"], result["bad_gradients"]) == ({}, [])
    assert result["waits"] == WAITS_OF_A_LAYER.get(CASES[case].model, 0) * CASES[case].layers


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_seen(case: str) -> None:
    _, part = FAULTS[case]
    assert any(part in error for error in found(case)["errors"])


@pytest.mark.parametrize("case", LAUNCHES)
def test_a_layer_launches_few_kernels(case: str) -> None:
    (layer,) = found(case)["layers"]
    _, forward, backward = LAUNCHES[case]
    assert 0 < layer["forward"] <= forward
    assert 0 < layer["backward"] <= backward


def test_documents_launch_few_kernels() -> None:
    ((few,), (many,)) = (found(case)["layers"] for case in DOCUMENTS)
    for part, of_a_document in LAUNCHES_OF_A_DOCUMENT.items():
        assert many[part] - few[part] <= of_a_document * (MANY - FEW)


def test_more_experts_launch_no_more_kernels() -> None:
    (few,), (many,) = (found(case)["layers"] for case in EXPERTS)
    assert few == many
