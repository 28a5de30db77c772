"""Measures contenders side by side: agreement of gradients, time in interleaved rounds, memory, FLOPs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.contenders import Contender, Work, build_contender
from benchmarks.flops import Counts, count_flops
from benchmarks.sizes import Size
from mst_ds.memory.dry_run import host_left_out
from mst_ds.memory.live import LiveMemory

Part: TypeAlias = Literal["step", "layers"]
PARTS: tuple[Part, ...] = ("step", "layers")

# Relative error of a parameter's gradient against the ordinary model's, both rounded, and summed in another order: some
# hundred roundings in fp32; in bf16, where a sum over chunks may be rounded chunk by chunk, several per cent.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Result:
    """Of one contender at one length. Bytes are above what lies there before the step: weights and inputs."""

    contender: str
    seconds: tuple[float, ...]
    gradient_error: float
    peak_bytes: int
    counts: Counts


class Bench:
    """One set of weights and one sequence, for any contender."""

    def __init__(self, size: Size, seq_len: int, device: torch.device, seed: int = 0) -> None:
        torch.manual_seed(seed)
        config = size.config(max_position_embeddings=seq_len)
        with device:
            model: Any = LlamaForCausalLM(config)
            self.model: nn.Module = model.to(size.dtype).train()
            self.input_ids = torch.randint(config.vocab_size, (1, seq_len))
            self.inputs_embeds = torch.randn(1, seq_len, config.hidden_size, dtype=size.dtype)
            # Any but one along the output, which a norm has made of a constant length.
            self.output_gradient = torch.randn_like(self.inputs_embeds)
        self.device = device
        self.tolerance = TOLERANCES[size.dtype]

    def contender(self, name: str, work: Work) -> Contender:
        """A contender with these weights."""
        return build_contender(name, self.model, work)

    def run(self, contender: Contender, part: Part) -> None:
        """Forward and backward, from no gradients to all of them."""
        self.model.zero_grad()
        if part == "step":
            contender.loss(self.input_ids).backward()
        else:
            inputs = self.inputs_embeds.detach().requires_grad_()
            contender.hidden_states(inputs).backward(self.output_gradient)

    def examine(self, contender: Contender, part: Part) -> tuple[dict[str, Tensor], int, Counts]:
        """Gradients by parameter, on the host, without those that the part does not reach; `peak_bytes`; and what is
        computed: all of one run, because long sequences take minutes."""
        found: list[int] = []
        counts = count_flops(lambda: found.append(self.peak_bytes(contender, part)))
        named = self.model.named_parameters()
        gradients = {name: p.grad.to("cpu", copy=True) for name, p in named if p.grad is not None and p.grad.any()}
        return gradients, found[0], counts

    def seconds(self, contender: Contender, part: Part) -> float:
        """The time of one run."""
        _synchronize(self.device)
        start = time.perf_counter()
        self.run(contender, part)
        _synchronize(self.device)
        return time.perf_counter() - start

    def peak_bytes(self, contender: Contender, part: Part) -> int:
        """The most that is alive on the device in one run, gradients included, above what is there before.

        On the CPU live tensors, without what lies on the host on purpose; on CUDA what torch's allocator has given out.
        """
        self.model.zero_grad()
        if self.device.type == "cpu":
            with LiveMemory() as memory, host_left_out(memory):
                self.run(contender, part)
            return memory.peak
        _synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.run(contender, part)
        return torch.cuda.max_memory_allocated(self.device) - before


def measure(bench: Bench, names: Sequence[str], work: Work, part: Part, rounds: int) -> list[Result]:
    """Checks that gradients agree, then measures all contenders, each once a round, in rotating order.

    Raises:
        ValueError: a contender's gradients are not the ordinary model's.
    """
    contenders = [bench.contender(name, work) for name in names]
    reference = bench.examine(bench.contender("recompute", work), part)
    examined = {}
    for contender in contenders:
        is_reference = contender.name == "recompute"
        gradients, peak, counts = reference if is_reference else bench.examine(contender, part)
        error = _worst_error(gradients, reference[0], contender.name, bench.tolerance)
        examined[contender.name] = error, peak, counts
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    for index in range(rounds):
        first = index % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            seconds[contender.name].append(bench.seconds(contender, part))
    bench.model.zero_grad()
    return [Result(name, tuple(seconds[name]), *examined[name]) for name in names]


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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
