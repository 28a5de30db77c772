"""The fused kernels: in Triton's interpreter, compiled for a GPU that is not there, and what is done without them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mst_ds.minisequence import fused, rotary_embedding

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
# Triton decides when it is imported whether it interprets.
is_compiling = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs triton as a compiler")


@needs_triton
def test_in_the_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "interpreted_kernels.py",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, check=False, cwd=HERE, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def compiled(kernel, pointers, integers, floats, constants, warps=4):
    """The assembly of a kernel for an H100: in the order of its parameters so many of each kind, then constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = [*pointers, *["i32"] * integers, *["fp32"] * floats, *["constexpr"] * len(constants)]
    signature = dict(zip(kernel.arg_names, kinds, strict=True))
    source = ASTSource(kernel, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm


@needs_triton
@is_compiling
def test_kernels_compile_for_a_gpu(tmp_path, monkeypatch):
    """The interpreter takes what the compiler refuses, and says nothing of how bf16 is rounded."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from mst_ds.minisequence.fused import cross_entropy, norm, rotary, swiglu

    tile = {"ROWS": 1, "COLUMNS": 4096}
    needs = {"NEEDS_X": True, "NEEDS_WEIGHT": True, "TILES": 16}
    half = "*bf16"
    assemblies = [
        compiled(norm.forward_kernel, [half] * 3, 3, 2, tile, 8),
        compiled(norm.backward_kernel, [half] * 4 + ["*fp32"], 4, 2, needs | tile, 8),
        compiled(swiglu.product_kernel, [half] * 3, 1, 0, {"ELEMENTS": 1024}),
        compiled(swiglu.backward_kernel, [half] * 5, 1, 0, {"ELEMENTS": 1024}),
        compiled(rotary.rotate_kernel, [half] * 4, 10, 0, {"IS_BACKWARD": True, "ROWS": 16, "COLUMNS": 64}),
        compiled(
            cross_entropy.cross_entropy_kernel,
            [half, "*i64", "*fp32", "*fp32"],
            *(3, 1, {"NEEDS_GRADIENTS": True, "COLUMNS": 8192}, 16),
        ),
    ]
    # To the nearest, two numbers or one at a time.
    assert all("cvt.rn.bf16" in assembly["ptx"] for assembly in assemblies)


def heads_and_angles():
    heads = torch.empty(1, 4, 32, 16, dtype=torch.bfloat16, device="cuda")
    return heads, *torch.empty(2, 1, 32, 16, dtype=torch.bfloat16, device="cuda")


class OperatorNames(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@needs_triton
def test_fake_tensors_of_a_gpu_pass_through_a_kernel():
    with FakeTensorMode():
        given = heads_and_angles()
        with torch.no_grad(), OperatorNames() as operators:
            assert rotary_embedding(*given).shape == (1, 4, 32, 16)
    assert operators.names.count("mst_ds::rotary") == 1
    assert "aten::mul" not in operators.names


def test_without_triton_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(fused, "is_installed", lambda: False)
    fused.kernels_run.cache_clear()
    assert not fused.kernels_run(torch.device("cuda"), torch.bfloat16)
    with FakeTensorMode():
        assert not fused.runs(*heads_and_angles())
    fused.kernels_run.cache_clear()


def test_without_the_interpreter_a_cpu_has_no_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    fused.kernels_run.cache_clear()
    assert not fused.runs(torch.ones(4, dtype=torch.bfloat16))


@needs_triton
@is_compiling
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_on_which_no_kernel_runs_has_a_warning():
    fused.kernels_run.cache_clear()
    with pytest.warns(UserWarning, match=r"Triton does not run here with torch\.float16 \(.+\): norms, rotary"):
        assert not fused.kernels_run(torch.device("cuda"), torch.float16)
