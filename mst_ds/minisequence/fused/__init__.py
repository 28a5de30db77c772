"""Operators as one Triton kernel for each direction, in place of several of torch's: every tensor is read and written
once, and nothing is rounded in between.

Triton comes with torch's CUDA builds. Where it is missing, or a kernel of it does not run, operators are plain torch.
The modules beside this one import it, so they are imported only where `runs` says so.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mst_ds.dtypes import HALVES

# Wider rows of a norm do not fit into a multiprocessor's registers.
WIDEST_NORM = 16384

_LIBRARY = torch.library.Library("mst_ds", "FRAGMENT")


def operator(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function that launches kernels, and returns nothing, an operator of torch with this schema.

    So fake tensors pass through it, and whoever counts operators sees one.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def on_its_device(first: Tensor, *others: Any) -> None:
            # Triton launches on the current device, whose tensors these may not be.
            with torch.cuda.device_of(first):
                function(first, *others)

        name = _LIBRARY.define(schema)
        _LIBRARY.impl(name, on_its_device, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, lambda *_: None, "Meta")
        found: Callable[..., None] = getattr(torch.ops.mst_ds, name.split("::")[-1]).default
        return found

    return register


def runs(*tensors: Tensor) -> bool:
    """Whether kernels take these: all in the same 16 bits, on a GPU or, for tests, in Triton's interpreter."""
    first = tensors[0]
    if first.dtype not in HALVES or any(tensor.dtype != first.dtype for tensor in tensors):
        return False
    if isinstance(first, FakeTensor):
        # Of a GPU that cannot be asked.
        return first.device.type == "cuda" and is_installed()
    return kernels_run(first.device, first.dtype)


@functools.cache
def is_installed() -> bool:
    return find_spec("triton") is not None


@functools.cache
def kernels_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Asked of the device once, by a kernel: Triton needs a C compiler on the machine, and not too old a GPU."""
    if not is_installed():
        return False
    if device.type != "cuda":
        return os.environ.get("TRITON_INTERPRET") == "1"
    try:
        from mst_ds.minisequence.fused import swiglu

        ones = torch.ones(16, device=device, dtype=dtype)
        swiglu.product(ones, ones, out := torch.empty_like(ones))
        is_right = bool((out.float() - 0.731).abs().max() < 0.01)
        reason = "gives a wrong product"
    except Exception as error:  # of Triton, the C compiler or the driver
        is_right, reason = False, str(error).partition("\n")[0]
    if not is_right:
        warnings.warn(
            f"Triton does not run here with {dtype} ({reason}): norms, rotary embeddings, SwiGLU and the loss are "
            "several kernels of torch each, which takes longer",
            stacklevel=2,
        )
    return is_right
