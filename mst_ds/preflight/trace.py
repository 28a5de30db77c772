"""What the modules of a model take and give in one forward and backward, token by token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mst_ds.layer_stream import LayerCall, LayerStream, Pass


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
    """Records the modules of `model` from now on, but for `without`, at their first call.

    Inside a streamed layer it is one call of the layer, of which a module sees chunk by chunk: what it takes and gives
    when a chunk is computed for the first time, for nothing is left out then, and the gradients when it is computed
    again, for only then there are some.

    Args:
        batch_size: B, length: L, of what the model is called with.
        stream: of the model's layers; None where they run as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        length: int,
        *,
        without: Collection[nn.Module] = (),
        stream: LayerStream | None = None,
    ) -> None:
        self._modules: dict[str, _Recorded] = {}
        self._finished: dict[str, None] = {}
        self._batch_size, self._length, self._stream = batch_size, length, stream
        for name, module in model.named_modules():
            if name and module not in without:
                module.register_forward_pre_hook(self._before(name), with_kwargs=True)
                module.register_forward_hook(self._after(name))

    @property
    def trace(self) -> Trace:
        """What was recorded so far."""
        return {name: self._modules[name].joined() for name in self._finished}

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            record = self._modules.setdefault(name, _Recorded()).begin(self._call)
            if record is None:
                return None
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
            record = self._modules[name].end(self._call)
            if record is None:
                return
            self._finished.setdefault(name)
            tensor = _first_tensor(output)
            if tensor is None:
                return
            if tensor.dim() == 0:
                record.scalar = tensor.detach().clone()
            record.output = self._by_token(tensor)
            self._tap(tensor, record, "output_gradient")

        return hook

    @property
    def _call(self) -> LayerCall | None:
        return None if self._stream is None else self._stream.call

    def _tap(self, tensor: Tensor, record: ModuleRecord, field: str) -> Tensor:
        if tensor.requires_grad:
            by_token = functools.partial(_by_token, batch_size=self._batch_size, length=self._tokens)
            tensor.register_hook(lambda gradient: setattr(record, field, by_token(gradient)))
        return tensor

    @property
    def _tokens(self) -> int:
        """Of a row, in what a module takes now."""
        call = self._call
        return self._length if call is None else call.tokens.stop - call.tokens.start

    def _by_token(self, value: object) -> Tensor | None:
        return _by_token(value, self._batch_size, self._tokens)


class _Recorded:
    """The first call of a module, or, inside a streamed layer, its first in each chunk of one call of the layer."""

    def __init__(self) -> None:
        self._call: LayerCall | None = None
        # By what a chunk runs for, and its number.
        self._begun: dict[tuple[Pass, int], ModuleRecord] = {}
        self._ended: set[tuple[Pass, int]] = set()

    def begin(self, call: LayerCall | None) -> ModuleRecord | None:
        """Where the call that begins is recorded; None where it is not."""
        if not self._begun:
            self._call = call
        key = _key(call)
        if call is not self._call or key in self._begun:
            return None
        return self._begun.setdefault(key, ModuleRecord())

    def end(self, call: LayerCall | None) -> ModuleRecord | None:
        """The same of the call that ends."""
        key = _key(call)
        if call is not self._call or key in self._ended:
            return None
        self._ended.add(key)
        return self._begun[key]

    def joined(self) -> ModuleRecord:
        """Of all tokens."""
        if self._call is None:
            (record,) = self._begun.values()
            return record
        first, again = (
            [self._begun.get((runs_for, chunk), ModuleRecord()) for chunk in range(len(self._call.chunks))]
            for runs_for in (Pass.FORWARD, Pass.BACKWARD)
        )
        joined = ModuleRecord()
        for field in fields(ModuleRecord):
            parts = [getattr(record, field.name) for record in (again if field.name in _GRADIENTS else first)]
            if all(part is not None for part in parts):
                joined_part = torch.stack(parts).sum() if field.name == "scalar" else torch.cat(parts, dim=1)
                setattr(joined, field.name, joined_part)
        return joined


_GRADIENTS = ("input_gradient", "output_gradient")


def _key(call: LayerCall | None) -> tuple[Pass, int]:
    return (Pass.FORWARD, 0) if call is None else (call.runs_for, call.chunk)


def _by_token(value: object, batch_size: int, length: int) -> Tensor | None:
    """(B, L, ...) or (B * L, ...) -> (B, L, C); None for what is not floating or not by token."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
        return None
    shape = (batch_size, length)
    if value.shape[:2] == shape or value.shape[0] == batch_size * length:
        # A copy: an operator may write over it.
        return value.detach().clone().reshape(*shape, -1)
    return None


def join_traces(
    traces: Sequence[Trace],
    tokens: Callable[[Tensor], Tensor],
    join: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> Trace:
    """One trace from those of several parts of the tokens: scalars added up, tokens put together.

    Args:
        tokens: takes (B, S, C), the parts put together, to what is to be compared.
        join: puts (B, L, C) of each part together, as the layout of shards has it. None: one after another.
    """
    join = join or functools.partial(torch.cat, dim=1)
    names = [name for name in traces[0] if all(name in trace for trace in traces)]
    return {name: _join([trace[name] for trace in traces], tokens, join) for name in names}


def _join(
    records: Sequence[ModuleRecord],
    tokens: Callable[[Tensor], Tensor],
    join: Callable[[Sequence[Tensor]], Tensor],
) -> ModuleRecord:
    joined = ModuleRecord()
    for name in (field.name for field in fields(ModuleRecord)):
        parts = [part for record in records if (part := getattr(record, name)) is not None]
        if len(parts) < len(records):
            continue
        if name == "scalar":
            value = torch.stack(parts).sum()
        else:
            whole = join(parts)
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
