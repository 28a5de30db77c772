"""Measures contenders side by side: agreement of gradients, time in interleaved rounds, memory, FLOPs."""

from __future__ import annotations

import copy
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.contenders import Contender, Work, build_contender
from benchmarks.flops import Counts, count_flops
from benchmarks.sizes import Size
from mst_ds.memory.dry_run import host_left_out
from mst_ds.memory.live import LiveMemory

Part: TypeAlias = Literal["step", "layers"]
T = TypeVar("T")
PARTS: tuple[Part, ...] = ("step", "layers")

# Relative error of a parameter's gradient against the ordinary model's, both rounded, and summed in another order: some
# hundred roundings in fp32; in bf16, where a sum over chunks may be rounded chunk by chunk, several per cent.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Usage:
    """Time and memory of one run.

    Args:
        seconds: of the run, which may be the first.
        peak_bytes: the most that is alive at once, above what lies there before the step: weights and inputs.
        reserved_bytes: what torch's allocator holds of the device at the end; None on a CPU.
        outside_bytes: what of the device is taken and not torch's, by this process or others; None on a CPU.
    """

    seconds: float
    peak_bytes: int
    reserved_bytes: int | None = None
    outside_bytes: int | None = None


@dataclass(frozen=True)
class Result:
    """Of one contender at one length; memory as in `Usage`."""

    contender: str
    seconds: tuple[float, ...]
    gradient_error: float
    peak_bytes: int
    reserved_bytes: int | None
    outside_bytes: int | None
    counts: Counts


@dataclass(frozen=True)
class Measured:
    """Of several contenders at one length.

    Args:
        results: of those that ran, in the order in which they were named.
        reference: whose gradients the others' were compared with; None where none ran.
        out_of_memory: those for which the device was too small.
    """

    results: list[Result]
    reference: str | None
    out_of_memory: list[str]


class Bench:
    """One set of weights and one sequence, for any contender."""

    def __init__(self, size: Size, seq_len: int, device: torch.device, seed: int = 0) -> None:
        torch.manual_seed(seed)
        config = size.config(max_position_embeddings=seq_len)
        with device:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=size.dtype)
        self.model: nn.Module = model.train()
        self.device = device
        self.tolerance = TOLERANCES[size.dtype]
        self._size = size
        self._draw(seq_len)

    def at(self, seq_len: int) -> Bench:
        """The same weights with another sequence."""
        other = copy.copy(self)
        other._draw(seq_len)
        return other

    def _draw(self, seq_len: int) -> None:
        with self.device:
            self.input_ids = torch.randint(self._size.config().vocab_size, (1, seq_len))
        self._of_layers: tuple[Tensor, Tensor] | None = None

    def _ends_of_layers(self) -> tuple[Tensor, Tensor]:
        """The first layer's input and the gradient of the last one's output, (1, S, H): made where they are used, since
        at a long length they are a part of what there is of memory."""
        if self._of_layers is None:
            shape = (*self.input_ids.shape, self._size.config().hidden_size)
            # Any gradient but one along the output, which a norm has made of a constant length.
            inputs, gradient = (torch.randn(shape, dtype=self._size.dtype, device=self.device) for _ in range(2))
            self._of_layers = inputs, gradient
        return self._of_layers

    def contender(self, name: str, work: Work) -> Contender:
        """A contender with these weights."""
        return build_contender(name, self.model, work)

    def run(self, contender: Contender, part: Part) -> None:
        """Forward and backward, from no gradients to all of them."""
        self.model.zero_grad()
        if part == "step":
            contender.loss(self.input_ids).backward()
        else:
            inputs, gradient = self._ends_of_layers()
            contender.hidden_states(inputs.detach().requires_grad_()).backward(gradient)

    def examine(self, contender: Contender, part: Part) -> tuple[Usage, Counts]:
        """What one run takes and computes; its gradients are there afterwards. All of one run, because long sequences
        take minutes."""
        found: list[Usage] = []
        counts = count_flops(lambda: found.append(self.usage(contender, part)))
        return found[0], counts

    def gradients(self) -> dict[str, Tensor]:
        """By parameter, on the host, without those that the part did not reach."""
        named = self.model.named_parameters()
        return {name: p.grad.to("cpu", copy=True) for name, p in named if p.grad is not None and p.grad.any()}

    def seconds(self, contender: Contender, part: Part) -> float:
        """The time of one run."""
        synchronize(self.device)
        start = time.perf_counter()
        self.run(contender, part)
        synchronize(self.device)
        return time.perf_counter() - start

    def usage(self, contender: Contender, part: Part) -> Usage:
        """The memory of one run, gradients included, and its time: on the CPU of live tensors, without what lies on the
        host on purpose, which takes longer than the run itself; on CUDA of what torch's allocator has given out."""
        self.model.zero_grad()
        if part == "layers":
            self._ends_of_layers()
        if self.device.type == "cpu":
            with LiveMemory() as memory, host_left_out(memory):
                seconds = self.seconds(contender, part)
            return Usage(seconds, memory.peak)
        synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        seconds = self.seconds(contender, part)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        return Usage(seconds, peak, torch.cuda.memory_reserved(self.device), outside_bytes(self.device))

    def fits(self, name: str, work: Work, part: Part, memory: int) -> Usage | None:
        """What a run takes, None where memory runs out: on a CPU where it takes more than `memory` bytes."""
        usage = self.unless_out_of_memory(lambda: self.usage(self.contender(name, work), part))
        return None if usage is None or (self.device.type == "cpu" and usage.peak_bytes > memory) else usage

    def unless_out_of_memory(self, run: Callable[[], T]) -> T | None:
        """What `run` returns, None where memory runs out; what that left behind is freed."""
        try:
            return run()
        except torch.OutOfMemoryError:
            self.model.zero_grad()
        # Not before the exception is gone, which holds what the run had made.
        free_memory(self.device)
        return None


def measure(bench: Bench, names: Sequence[str], work: Work, part: Part, rounds: int) -> Measured:
    """Checks that gradients agree, then measures all contenders, each once a round, in rotating order.

    Gradients are compared with those of ordinary recompute, or where memory does not suffice for it with those of the
    first contender for which it does.

    Raises:
        ValueError: a contender's gradients are others.
    """
    examined: dict[str, tuple[float, Usage, Counts]] = {}
    contenders = {name: bench.contender(name, work) for name in names}
    reference, expected = None, dict[str, Tensor]()
    for name in dict.fromkeys(("recompute", *names)):
        contender = contenders.get(name) or bench.contender(name, work)
        found = bench.unless_out_of_memory(functools.partial(_examine, bench, contender, part))
        if found is None:
            continue
        gradients, usage, counts = found
        if reference is None:
            reference, expected = name, gradients
        error = _worst_error(gradients, expected, name, bench.tolerance)
        examined[name] = error, usage, counts
    ran = [name for name in names if name in examined]
    seconds: dict[str, list[float]] = {name: [] for name in ran}
    for name, value in interleaved_seconds(bench, [contenders[name] for name in ran], part, rounds):
        seconds[name].append(value)
    results = []
    for name in ran:
        error, usage, counts = examined[name]
        memory = usage.peak_bytes, usage.reserved_bytes, usage.outside_bytes
        results.append(Result(name, tuple(seconds[name]), error, *memory, counts))
    return Measured(results, reference, [name for name in names if name not in examined])


def _examine(bench: Bench, contender: Contender, part: Part) -> tuple[dict[str, Tensor], Usage, Counts]:
    usage, counts = bench.examine(contender, part)
    return bench.gradients(), usage, counts


def interleaved_seconds(
    bench: Bench, contenders: Sequence[Contender], part: Part, rounds: int
) -> Iterator[tuple[str, float]]:
    """Names and times as they are measured, each contender once a round, in rotating order."""
    for index in range(rounds if contenders else 0):
        first = index % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            yield contender.name, bench.seconds(contender, part)
    bench.model.zero_grad()


def longest(fits: Callable[[int], bool], shortest: int, step: int) -> int:
    """The greatest multiple of `step` that fits, by doubling from `shortest` and then bisection; 0 if none does."""
    low, high = 0, shortest
    while fits(high):
        low, high = high, 2 * high
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _worst_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str, tolerance: float) -> float:
    if found.keys() != expected.keys():
        raise ValueError(f"{name} has gradients for other parameters: {sorted(found.keys() ^ expected.keys())}")
    errors = {key: _relative_error(found[key], expected[key]) for key in expected}
    worst = max(errors, key=lambda key: errors[key])
    if not errors[worst] <= tolerance:
        raise ValueError(f"{name}: the gradient of {worst} is off by {errors[worst]:.1e}; allowed: {tolerance:.0e}")
    return errors[worst]


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Gives back to the device what nothing needs any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def outside_bytes(device: torch.device) -> int:
    """What of a GPU's memory is taken and not torch's: CUDA's context, libraries, other processes."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
