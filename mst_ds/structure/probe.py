"""Stand-ins of a few elements, in fp64, on which a module's own forward is run to see what it computes.

Weights are never read, so a model may lie on the meta device, and ZeRO-3 need not gather it.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Small, and all different, so that a mixed-up dimension cannot go unnoticed.
HIDDEN, INTERMEDIATE, VOCAB = 6, 10, 14
# Tokens enough for what mixes those that are far apart; several rows, because a chunk knows nothing of rows.
ROWS, LENGTH = 3, 129
TOKENS = ROWS * LENGTH

_SEED = 0
_OTHER_SIZES = (INTERMEDIATE, 14, 22, 26, 34, 38, 46, 58)
# Weights of a miniature stay cheap to draw.
_LARGEST_SIZE = 512


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Within, random numbers are drawn that nobody outside misses, and that are the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        yield


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device="cpu")


def small_and_large_tokens(*shape: int) -> Tensor:
    """(..., T, C): a clamp shows in large ones only."""
    return random_tensor(*shape) * torch.logspace(-2, 4, shape[-2], dtype=torch.float64, device="cpu")[:, None]


def attempt(function: Callable[..., Any], *inputs: Tensor, **kwargs: Any) -> Any:
    """What `function` gives; None where it fails, writes to its inputs, or draws random numbers."""
    before = [tensor.clone() for tensor in inputs]
    try:
        with _WithoutRandomNumbers():
            result = function(*inputs, **kwargs)
    except Exception:  # a model's own code may raise anything
        return None
    return result if all(map(torch.equal, inputs, before)) else None


def is_same(
    first: Callable[..., Any],
    second: Callable[..., Any],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    tolerance: float = 1e-9,
) -> bool:
    """Whether two functions give the same tensor for `inputs`, and the same gradients of these and of `parameters`.

    The default tolerance is for functions that differ in the order of their fp64 sums.
    """
    results = [attempt(functools.partial(_value_and_gradients, f, parameters), *inputs) for f in (first, second)]
    return None not in results and all(_is_close(*pair, tolerance=tolerance) for pair in zip(*results, strict=True))


def _value_and_gradients(
    function: Callable[..., Tensor], parameters: Sequence[Tensor], *inputs: Tensor
) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad] + list(parameters)
    with torch.enable_grad():
        output = function(*leaves)
    # Some incoming gradient, the same for every function.
    weights = torch.arange(output.numel(), dtype=output.dtype, device=output.device).sin().view_as(output)
    grads = torch.autograd.grad(output, wanted, weights, allow_unused=True, materialize_grads=True)
    return [output.detach(), *grads]


def _is_close(actual: Tensor, expected: Tensor, *, tolerance: float) -> bool:
    """By row, so that large tokens do not cover small ones."""
    if actual.shape != expected.shape:
        return False
    error, size = ((actual - expected).norm(dim=-1), expected.norm(dim=-1))
    return bool((error <= tolerance * (size + 0.1)).all())


class DispatchMode(TorchDispatchMode):
    """A dispatch mode for several threads at once, such as the ranks of a simulated group.

    Around each operation torch's own switches the compiler's frame evaluation off and on, for all threads together:
    with several of them the interpreter now and then crashes (seen with Python 3.11).
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _WithoutRandomNumbers(DispatchMode):
    """Within, this thread cannot draw random numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(f"{func} draws random numbers")
        return func(*args, **(kwargs or {}))


class WithoutDropout(TorchFunctionMode):
    """Within, dropout gives back what it gets. All else that is random stays so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.dropout:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


def with_stand_ins(module: nn.Module, stand_ins: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow copy of `module`, in training, with some of its children replaced."""
    probe = _shallow_copy(module)
    probe.__dict__["_buffers"] = _copies_of_buffers(module)
    probe.__dict__["_modules"] = {**module._modules, **stand_ins}
    # As in training: a module with dropout must not pass for one without.
    probe.__dict__["training"] = True
    return probe


def is_changed_by_user(module: nn.Module) -> bool:
    """Whether calling the module, or one in it, is more than its class's forward: what a chunked operator skips."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any("forward" in child.__dict__ or any(getattr(child, hook) for hook in hooks) for child in module.modules())


def miniatures(module: nn.Module, hidden_size: int) -> Iterator[tuple[nn.Module, int]]:
    """Copies of `module` and all in it with small random weights, each with what `hidden_size` became.

    In the first, different sizes become different small ones, and one that is twice another stays so. In the second,
    where that is small enough, all but the number of experts are divided by one number, which keeps every sum and
    multiple. A module that runs in neither is not understood.
    """
    shapes = [shape_of(parameter) for parameter in module.parameters()]
    small = _small_sizes(hidden_size, {size for shape in shapes for size in shape})
    yield _miniature(module, small), small[hidden_size]
    # The first dimension of weights with three counts experts; it may be equal to another by chance.
    widths = {hidden_size, *(size for shape in shapes for size in shape[len(shape) == 3 :])}
    divided = small | _divided_sizes(widths)
    if max(divided.values()) <= _LARGEST_SIZE:
        yield _miniature(module, divided), divided[hidden_size]


def shape_of(parameter: Tensor) -> torch.Size:
    # Under ZeRO-3 a parameter is a placeholder; its shape is kept beside it.
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _small_sizes(hidden_size: int, sizes: set[int]) -> dict[int, int]:
    small = {hidden_size: HIDDEN}
    others = iter(_OTHER_SIZES)
    for size in sorted(sizes - {hidden_size, 1}):  # a dimension of 1 is there to be broadcast
        if size % 2 == 0 and size // 2 in small:
            small[size] = 2 * small[size // 2]
        elif 2 * size == hidden_size:
            small[size] = HIDDEN // 2
        else:
            small[size] = next(others, size)
    return small


def _divided_sizes(sizes: set[int]) -> dict[int, int]:
    sizes = sizes - {0, 1}
    unit = math.gcd(*sizes)
    factor = -(-4 * unit // min(sizes))  # the smallest becomes 4 at least
    return {size: size // unit * factor for size in sizes}


def _miniature(module: nn.Module, sizes: Mapping[int, int]) -> nn.Module:
    clone = _shallow_copy(module)
    for name, value in module.__dict__.items():
        if type(value) is int:
            clone.__dict__[name] = sizes.get(value, value)
        elif type(value) is tuple and all(type(size) is int for size in value):  # the shape that a LayerNorm has
            clone.__dict__[name] = tuple(sizes.get(size, size) for size in value)
    config = getattr(module, "config", None)
    if getattr(config, "_experts_implementation", None) is not None:
        clone.__dict__["config"] = copy.copy(config)
        clone.__dict__["config"]._experts_implementation = "eager"  # the others have no fp64
    clone.__dict__["training"] = True
    clone.__dict__["_parameters"] = {
        name: _small_parameter(parameter, sizes) if parameter is not None else None
        for name, parameter in module._parameters.items()
    }
    clone.__dict__["_buffers"] = _copies_of_buffers(module)
    clone.__dict__["_modules"] = {
        name: _miniature(child, sizes) if child is not None else None for name, child in module._modules.items()
    }
    return clone


def _shallow_copy(module: nn.Module) -> nn.Module:
    # What `copy` does, but parametrized modules refuse that.
    clone = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    return clone


def _copies_of_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    # A forward may write to them. On the meta device they have no values: any will do.
    copies: dict[str, Tensor | None] = dict.fromkeys(module._buffers)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            values = torch.rand(buffer.shape, device="cpu").to(buffer.dtype) if buffer.is_meta else buffer.clone().cpu()
            copies[name] = values.double() if values.is_floating_point() else values
    return copies


def _small_parameter(parameter: Tensor, sizes: Mapping[int, int]) -> nn.Parameter:
    return nn.Parameter(random_tensor(*(sizes.get(size, size) for size in shape_of(parameter))))
