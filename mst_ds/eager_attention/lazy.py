"""Tensors of all tokens to all, without elements: what a module does with them is understood instead of computed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from mst_ds.attention import Mask
from mst_ds.sequence_parallel import UlyssesContext

T = TypeVar("T")

# Shape, dtype and device, which are there.
_METADATA = {
    Tensor.device.__get__,
    Tensor.dim,
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.is_floating_point,
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.size,
}


class NotUnderstood(ValueError):
    """A module does something with its scores that this project does not compute."""


@dataclass
class ModuleCall:
    """One forward of a module that writes attention out.

    Args:
        batch, length: B and L of its hidden states, of this shard or of a chunk of it.
        tokens: which L of the shard's those are.
        facts: what was found out of its tensors in its first forward, where it asks in the same order.

    Attributes:
        attended: how often it has attended.
    """

    module: nn.Module
    context: UlyssesContext
    batch: int
    length: int
    tokens: slice
    facts: list[Any]
    attended: int = 0
    _asked: int = field(default=0, repr=False)

    def refuse(self, what: str) -> NoReturn:
        """Raises: NotUnderstood: always."""
        raise NotUnderstood(f"{type(self.module).__name__} {what}, which mst_ds's attention does not know")

    def ask(self, of: Tensor, find_out: Callable[[], T], unknown: T) -> T:
        """`find_out()`, which reads from the device, and does so once for each place in a module's forward.

        Args:
            of: the tensor that is looked at; of one without elements the answer is `unknown`.
        """
        if of.device.type == "meta" or isinstance(of, FakeTensor):
            return unknown
        if self._asked == len(self.facts):
            self.facts.append(find_out())
        self._asked += 1
        found: T = self.facts[self._asked - 1]
        return found


class Lazy(Tensor):
    """Base of tensors without elements. Each may be used once: then no operation that writes to it, or reads it again,
    can be missed."""

    call: ModuleCall
    is_used: bool

    @staticmethod
    def __new__(cls, call: ModuleCall, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
        made: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.call, made.is_used = call, False
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        # Also in a list, such as that of `cat`.
        lazy = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Lazy)]
        # Scores know patterns; patterns know no scores.
        first = max(lazy, key=lambda each: each.knows_others)
        name = name_of(func)
        handler = first.operations().get(name)
        if handler is None or any(each.is_used for each in lazy):
            again = "" if handler is None else " again"
            first.call.refuse(f"calls {name} on its attention's scores or mask{again}")
        for each in lazy:
            each.is_used = not isinstance(each, Pattern)
        return handler(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} on a tensor that has no elements")

    knows_others = False

    @classmethod
    def operations(cls) -> Mapping[str, Callable[..., Any]]:
        """What can be done with it, by `name_of`."""
        raise NotImplementedError


def name_of(func: Callable[..., Any]) -> str:
    """ "add" for torch.add, Tensor.add, Tensor.__add__, and in place."""
    return getattr(func, "__name__", repr(func)).strip("_")


class Pattern(Lazy):
    """(..., L, L) with one value where a query sees a key and another where it does not.

    Attributes:
        seen, hidden: the values.
        mask: what is hidden beside what is to come.
    """

    seen: Any
    hidden: Any
    mask: Mask | None

    @classmethod
    def of(
        cls,
        call: ModuleCall,
        values: tuple[Any, Any],
        mask: Mask | None,
        *,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Pattern:
        """Args:
        values: where a query sees a key, and where it does not.
        """
        pattern: Pattern = cls(call, shape, dtype, device)
        pattern.seen, pattern.hidden = values
        pattern.mask = mask
        return pattern

    @classmethod
    def operations(cls) -> Mapping[str, Callable[..., Any]]:
        return _ON_PATTERNS

    def mapped(self, function: Callable[[Any], Any], dtype: torch.dtype | None = None) -> Pattern:
        """With other values."""
        values = function(self.seen), function(self.hidden)
        dtype = self.dtype if dtype is None else dtype
        return Pattern.of(self.call, values, self.mask, shape=self.shape, dtype=dtype, device=self.device)


def _arithmetic(function: Callable[[Any, Any], Any], *, reflected: bool = False) -> Callable[..., Pattern]:
    def apply(first: Any, second: Any) -> Pattern:
        if reflected:
            first, second = second, first
        pattern, other = (first, second) if isinstance(first, Pattern) else (second, first)
        if isinstance(other, Tensor):
            pattern.call.refuse("combines its causal mask with another tensor")
        if first is pattern:
            return pattern.mapped(lambda value: function(value, other))
        return pattern.mapped(lambda value: function(other, value))

    return apply


def _converted(pattern: Pattern, *args: Any, **kwargs: Any) -> Pattern:
    dtype = dtype_of_call(*args, **kwargs) or pattern.dtype
    return pattern.mapped(bool, dtype=dtype) if dtype == torch.bool else pattern.mapped(lambda x: x, dtype=dtype)


def dtype_of_call(*args: Any, **kwargs: Any) -> torch.dtype | None:
    """That of the arguments of `Tensor.to`; None where they name none."""
    found = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
    likes = [value.dtype for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return next(iter([*found, *likes]), None)


def narrower(first: Mask | None, second: Mask | None, call: ModuleCall) -> Mask | None:
    """What is hidden by the one or the other."""
    both = [mask for mask in (first, second) if mask is not None]
    if len({type(mask) for mask in both}) > 1:
        call.refuse("has a sliding window within blocks")
    return min(both, key=lambda mask: mask.size, default=None)


def window_of(buffer: Tensor) -> int | None:
    """How many tokens a query sees by a buffer (..., n, n) of 1 and 0, as `tril` makes it.

    Returns:
        0 for all up to its own; None where it is another pattern.
    """
    size = buffer.shape[-1]
    matrix = buffer.reshape(size, size)
    window = int((matrix[-1] != 0).sum())
    expected = torch.ones_like(matrix, dtype=torch.bool).tril_().triu_(1 - window)
    return (0 if window == size else window) if torch.equal(matrix, expected.to(matrix.dtype)) else None


_ON_PATTERNS: Mapping[str, Callable[..., Any]] = {
    "add": _arithmetic(operator.add),
    "bitwise_not": lambda pattern: pattern.mapped(operator.not_),
    "bool": lambda pattern: _converted(pattern, torch.bool),
    "float": lambda pattern: _converted(pattern, torch.float32),
    "invert": lambda pattern: pattern.mapped(operator.not_),
    "logical_not": lambda pattern: pattern.mapped(operator.not_, dtype=torch.bool),
    "mul": _arithmetic(operator.mul),
    "neg": lambda pattern: pattern.mapped(operator.neg),
    "rsub": _arithmetic(operator.sub, reflected=True),
    "sub": _arithmetic(operator.sub),
    "to": _converted,
}
