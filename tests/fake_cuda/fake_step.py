"""Runs cases on fake CUDA tensors, in a process that has `device_guard.cpp` preloaded, and prints JSON for each."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from fake_cases import CASES, MODELS, Case
from fake_device import hopper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mst_ds import Settings, apply_settings
from mst_ds.minisequence import experts
from mst_ds.patching import decoder
from mst_ds.structure import decoder_layers

# Give the host a value of the device, and so wait for all that it still has to compute.
_WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim"}
_NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_"}


@dataclass
class Found:
    """What one case does. waits: how often the host read where experts' rows end, which has no other error."""

    errors: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    waits: int = 0


class Spy(TorchDispatchMode):
    """Counts the operators on CUDA that launch kernels, by name; notes where devices meet and where the host waits."""

    def __init__(self, found: Found, length: int) -> None:
        super().__init__()
        self.found, self._length = found, length

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        given = _tensors((args, kwargs))
        on_cuda = [tensor for tensor in given if tensor.device.type == "cuda"]
        if name in _WAITS and on_cuda:
            self._error(f"waits for {name}")
        # Two that fake tensors do not know.
        if name == "record_stream":
            return None
        if name == "_pin_memory":
            return args[0].clone()
        output = func(*args, **kwargs)
        all_of_it = [*given, *_tensors(output)]
        devices = {tensor.device.type for tensor in all_of_it}
        if "cuda" in devices and func.namespace != "prim" and not func.is_view and name not in _NO_LAUNCH:
            self.found.launches[name] += 1
        # Numbers, of no dimension, may stand on the CPU: they are arguments of the kernel.
        if name not in _NO_LAUNCH and len({tensor.device for tensor in all_of_it if tensor.dim()}) > 1:
            if name not in ("copy_", "_to_copy"):
                self._error(f"devices meet in {name}")
            elif not (kwargs.get("non_blocking") or args[2:3] == (True,)):
                self._error(f"waits for {name} between devices")
        if "softmax" in name and min(output.shape[-2:]) >= self._length:
            self._error(f"{name} of S x S scores")
        return output

    def _error(self, what: str) -> None:
        self.found.errors[f"{what}: {_where()}"] += 1


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _where() -> str:
    """The innermost line of the project that runs."""
    lines = [frame for frame in traceback.extract_stack() if "/mst_ds/" in frame.filename]
    return _line(lines)


def _line(frames: list[traceback.FrameSummary]) -> str:
    if not frames:
        return "outside mst_ds"
    return f"mst_ds/{frames[-1].filename.split('/mst_ds/')[-1]}, {frames[-1].name}"


class OneRank:
    """A rank in the middle of a sequence group: what the others send has the shape of its own."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = size // 2, size

    def all_to_all(self, received: Tensor, send: Tensor, receive_splits: list[int], send_splits: list[int]) -> None:
        assert (received.shape, send.shape) == ((sum(receive_splits),), (sum(send_splits),))
        assert (received.device, received.dtype) == (send.device, send.dtype)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor] * self.size

    def all_reduce(self, tensor: Tensor) -> None:
        pass


def build(case: Case) -> nn.Module:
    """The patched model on the meta device."""
    config_class, model_class, dimensions = MODELS[case.model]
    with torch.device("meta"):
        model = model_class(config_class(**{**dimensions, **case.dimensions, "num_hidden_layers": case.layers}))
    model = model.to(torch.bfloat16).train()
    chunks = -(-case.length // 2048)
    settings = Settings(**{"sp_size": case.sp_size, "mlp_chunks": chunks, "loss_chunks": chunks, **case.settings})
    return apply_settings(model, settings, sequence_group=OneRank(case.sp_size) if case.sp_size > 1 else None)


def measure(case: Case) -> dict[str, Any]:
    found, model = Found(), build(case)
    starts = [[index * case.length * case.sp_size // case.documents for index in range(case.documents)]]
    with ExitStack() as stack:
        # The only values of tensors that a forward asks for are given here, since there are none. Once for all layers:
        known = starts if case.documents > 1 else None
        stack.enter_context(patch.object(decoder, "find_document_starts", lambda *_: known))
        # Once for each layer with experts, all of which are equally popular here:
        stack.enter_context(patch.object(experts, "read_ends", functools.partial(_ends_of_experts, found)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(hopper())
        model = model.to_empty(device="cuda")
        layers = LayerLaunches(found, decoder_layers(model))
        if case.fault is not None:
            decoder_layers(model)[0].register_forward_pre_hook(functools.partial(_commit, case.fault))
        ids = torch.empty(1, case.length, dtype=torch.long, device="cuda")
        count = torch.empty((), dtype=torch.long, device="cuda")
        positions = {"position_ids": torch.empty_like(ids)} if case.documents > 1 else {}
        try:
            with Spy(found, case.length * case.sp_size // case.documents):
                model(input_ids=ids, shift_labels=ids, num_items_in_batch=count, **positions).loss.backward()
        except Exception as error:
            frames = [each for each in traceback.extract_tb(error.__traceback__) if "/mst_ds/" in each.filename]
            found.errors[f"{type(error).__name__} {str(error).splitlines()[0][:200]}: {_line(frames)}"] += 1
    gradients = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or (parameter.grad.device, parameter.grad.dtype) != (parameter.device, torch.bfloat16)
    ]
    return {
        "errors": found.errors,
        "waits": found.waits,
        "bad_gradients": gradients,
        "layers": layers.counts if not found.errors else [],
        "attention": {name: count for name, count in found.launches.items() if "attention" in name},
        "launches": dict(found.launches.most_common()),
    }


def _ends_of_experts(found: Found, ends: Tensor, of_tokens: torch.Size) -> list[int]:
    found.waits += 1
    return [of_tokens.numel() * (expert + 1) // len(ends) for expert in range(len(ends))]


def _commit(fault: Callable[[Tensor], Any], module: nn.Module, args: Any) -> None:
    fault(args[0])


class LayerLaunches:
    """Counts what each decoder layer launches: between its input and its output, and between their gradients."""

    def __init__(self, found: Found, layers: list[nn.Module]) -> None:
        self._found = found
        self.counts = [{"forward": 0, "backward": 0} for _ in layers]
        self._seen: set[int] = set()
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda module, args, index=index: self._begin(index, args))
            layer.register_forward_hook(lambda module, args, output, index=index: self._end(index, output))

    def _begin(self, index: int, args: Any) -> None:
        if not self.counts[index]["forward"]:
            self._add(index, "forward", -1)
            args[0].register_hook(lambda grad: self._add(index, "backward", 1))

    def _end(self, index: int, output: Any) -> None:
        if index not in self._seen:  # the layer may be computed again
            self._seen.add(index)
            self._add(index, "forward", 1)
            output = output[0] if isinstance(output, tuple) else output
            output.register_hook(lambda grad: self._add(index, "backward", -1))

    def _add(self, index: int, part: str, sign: int) -> None:
        self.counts[index][part] += sign * self._found.launches.total()


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or CASES:
        begin = time.perf_counter()
        found = measure(CASES[name])
        print(json.dumps({"case": name, "seconds": time.perf_counter() - begin, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # the thread that runs a device's backward would be ended by an abort
