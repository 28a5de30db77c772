"""What the modules of a model take and give in one forward and backward, token by token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mst_ds.token_layout import TokenLayout


@dataclass
class ModuleRecord:
    """The first call of a module: (B, L, C) each, None where a tensor has another shape or no gradient.

    input_gradient: by this use of the input alone; the tensor itself may have others.
    scalar: the output where that is one number, such as a loss.
    """

    input: Tensor | None = None
    output: Tensor | None = None
    input_gradient: Tensor | None = None
    output_gradient: Tensor | None = None
    scalar: Tensor | None = None


# By the module's name, in the order in which the modules finish: an inner one before the one around it.
Trace: TypeAlias = Mapping[str, ModuleRecord]


class Tracer:
    """Records the modules of `model` from now on, but for `without`, at their first call; a recompute is a second."""

    def __init__(self, model: nn.Module, batch_size: int, length: int, *, without: Collection[nn.Module] = ()) -> None:
        self.trace: dict[str, ModuleRecord] = {}
        self._started: dict[str, ModuleRecord] = {}
        self._batch_size, self._length = batch_size, length
        for name, module in model.named_modules():
            if name and module not in without:
                module.register_forward_pre_hook(self._before(name), with_kwargs=True)
                module.register_forward_hook(self._after(name))

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if name in self._started:
                return None
            record = self._started[name] = ModuleRecord()
            arguments: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            key = next((key for key, value in arguments.items() if self._by_token(value) is not None), None)
            if key is None:
                return None
            value = arguments[key]
            record.input = self._by_token(value)
            # A view of its own: the gradient that arrives there is this module's alone.
            arguments[key] = self._tap(value.view_as(value), record, "input_gradient")
            return tuple(arguments[index] for index in range(len(args))), {name: arguments[name] for name in kwargs}

        return hook

    def _after(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name in self.trace:
                return
            record = self.trace[name] = self._started[name]
            tensor = _first_tensor(output)
            if tensor is None:
                return
            if tensor.dim() == 0:
                record.scalar = tensor.detach().clone()
            record.output = self._by_token(tensor)
            self._tap(tensor, record, "output_gradient")

        return hook

    def _tap(self, tensor: Tensor, record: ModuleRecord, field: str) -> Tensor:
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: setattr(record, field, self._by_token(gradient)))
        return tensor

    def _by_token(self, value: object) -> Tensor | None:
        """(B, L, ...) or (B * L, ...) -> (B, L, C); None for what is not floating or not by token."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            return None
        shape = (self._batch_size, self._length)
        if value.shape[:2] == shape or value.shape[0] == self._batch_size * self._length:
            # A copy: an operator may write over it.
            return value.detach().clone().reshape(*shape, -1)
        return None


def join_shards(traces: Sequence[Trace], tokens: Callable[[Tensor], Tensor]) -> Trace:
    """One trace from those of the ranks of a sequence group: scalars added up, tokens put together.

    Args:
        tokens: takes (B, S, C), the shards put together, to what is to be compared.
    """
    names = [name for name in traces[0] if all(name in trace for trace in traces)]
    return {name: _join([trace[name] for trace in traces], tokens) for name in names}


def _join(records: Sequence[ModuleRecord], tokens: Callable[[Tensor], Tensor]) -> ModuleRecord:
    joined = ModuleRecord()
    for name in (field.name for field in fields(ModuleRecord)):
        parts = [part for record in records if (part := getattr(record, name)) is not None]
        if len(parts) < len(records):
            continue
        if name == "scalar":
            value = torch.stack(parts).sum()
        else:
            whole = TokenLayout(len(parts)).join(parts, dim=1)
            value = tokens(whole)
            if name.endswith("gradient"):
                # Of what stands on padding only this is to be compared: no gradient comes from there.
                value = torch.cat([value, whole.sum(dim=(0, 1)).unsqueeze(0)])
        setattr(joined, name, value)
    return joined


def _first_tensor(value: object) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    parts: Iterable[object] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, tuple | list):
        parts = value
    return next((tensor for part in parts if (tensor := _first_tensor(part)) is not None), None)
