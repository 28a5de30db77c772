"""Whether a gradient that autograd hands to a backward is nobody else's, so that it may be written over or let go."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _global_backward_hooks

# References to a gradient: of Python to the tensor, all to the tensor, and all to its memory.
Holders = tuple[int, int, int]
# Whose hook on a leaf module counts that a gradient is there, and does not read it (`reduce_leaf_module_grads`).
_READS_NO_GRADIENT = "deepspeed.runtime.zero.stage3"


def is_handed_over(grads: Sequence[Tensor | None], like: Tensor, device: torch.device, of_hooks: int = 0) -> bool:
    """Whether nobody but the backward that was given `grads` holds the first of them, or memory of it.

    torch itself adds to gradients in place under this condition (`can_accumulate_inplace`). A caller's own tensor, one
    that a hook or a module keeps, that is asked for or goes to several functions has more references.

    Args:
        grads: all that a backward was given, as it was given them.
        like, device: what is to be written there; the gradient has its shape and dtype, and no gaps.
        of_hooks: references of hooks that do not read it, `references_of_hooks` when the forward ran.
    """
    grad = grads[0]
    if grad is None or not grad.is_contiguous() or grad.device != device:
        return False
    if not grad.untyped_storage().resizable():  # another library's, such as an array's
        return False
    is_alike = grad.shape == like.shape and grad.dtype == like.dtype
    del grad
    of_python, *others = holders_of_handed_over()
    return is_alike and _holders(grads) == (of_python + of_hooks, *others)


def take_over(grad: Tensor) -> Tensor:
    """The memory of a gradient that is handed over. Autograd holds the tensor itself until the backward returns: it is
    left empty."""
    taken = grad.detach()
    grad.data = grad.new_empty(0)
    return taken


class BeginWith(torch.autograd.Function):
    """The scalar by which a tensor is differentiated with a gradient that autograd frees once it is used. What
    `torch.autograd.grad` is given it holds to its end."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gradient: list[Tensor]) -> Tensor:
        """gradient: one, that is taken out of the list."""
        ctx.gradient = gradient
        return tensor.new_empty(())  # nobody reads it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.pop(), None


@functools.cache
def holders_of_handed_over() -> Holders:
    """Those of a gradient that nobody else holds: what autograd itself takes differs with the versions of torch and
    Python. To be asked for the first time outside of a backward."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros(1, device="cpu", requires_grad=True)
        (_Probe.apply(leaf) * 2).sum().backward()
    return _Probe.found


def references_of_hooks(module: nn.Module) -> int:
    """How often torch will hold the gradient of what the module gives for hooks that do not read it: once where it has
    full backward hooks, and all are those of a leaf module of ZeRO-3."""
    hooks = module._backward_hooks.values()
    are_of_zero = all(getattr(hook, "__module__", None) == _READS_NO_GRADIENT for hook in hooks)
    return int(bool(hooks) and are_of_zero and not _global_backward_hooks)


class _Probe(torch.autograd.Function):
    found: Holders

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return leaf.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        _Probe.found = _holders(grads)
        return grads[0]


def _holders(grads: Sequence[Tensor | None]) -> Holders:
    grad: Any = grads[0]
    of_memory = torch._C._storage_Use_Count(grad.untyped_storage()._cdata)
    return sys.getrefcount(grad), grad._use_count(), of_memory
