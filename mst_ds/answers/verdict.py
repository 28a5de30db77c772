"""What decides whether a plan fits, by name, and what a run of it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mst_ds.config import GIB
from mst_ds.gpus import Gpu
from mst_ds.planner.flops import attention_flops, attention_forward_flops, forward_matrix_flops, matrix_flops
from mst_ds.planner.rates import rates_of
from mst_ds.planner.types import Plan
from mst_ds.planner.workload import Workload

_HOUR = 3600
DEFAULT_TOKENS = 10**9


@dataclass(frozen=True)
class Limit:
    """The memory that a plan has too little of, or of one that fits what it fills most.

    Attributes:
        phase: in which it is needed.
        needed, there: bytes of a device, or of a node's host.
    """

    place: Literal["device", "host"]
    phase: str
    needed: int
    there: int

    @property
    def name(self) -> str:
        return f"device, {self.phase}" if self.place == "device" else "host"

    def __str__(self) -> str:
        of_what = " a node" if self.place == "host" else ""
        digits = 1 if self.needed >= GIB else 3
        # One that lacks less than is shown must not read as if it had enough.
        if f"{self.needed / GIB:.{digits}f}" == f"{self.there / GIB:.{digits}f}":
            digits = 6
        return f"{self.name}: needs {self.needed / GIB:.{digits}f} GiB{of_what}, {self.there / GIB:.{digits}f} there"


def limit_of(plan: Plan, *, ranks_per_node: int) -> Limit:
    """The device's or the host's; the device's where both have too little."""
    device = Limit("device", plan.peak_phase.name, plan.peak_bytes, plan.device_memory)
    if plan.host_memory is None:
        return device
    ranks = min(ranks_per_node, plan.topology.world_size)
    phase = max(plan.phases, key=lambda phase: phase.host_bytes).name
    host = Limit("host", phase, ranks * plan.host_bytes, ranks * plan.host_memory)
    if (plan.peak_bytes <= plan.device_memory) != plan.fits:
        return host
    fills_host = plan.fits and host.needed * device.there > device.needed * host.there
    return host if fills_host else device


@dataclass(frozen=True)
class Cost:
    """What a training run of so many tokens takes, as predicted.

    Attributes:
        tokens: of the run, over all ranks.
        tokens_per_second: of all ranks.
        gpus: that the run has.
        price_per_gpu_hour: in whatever currency.
    """

    tokens: int
    tokens_per_second: float
    gpus: int
    price_per_gpu_hour: float | None = None

    @property
    def hours(self) -> float:
        return self.tokens / self.tokens_per_second / _HOUR

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus

    @property
    def price(self) -> float | None:
        return None if self.price_per_gpu_hour is None else self.gpu_hours * self.price_per_gpu_hour

    def __str__(self) -> str:
        price = "" if self.price is None else f", price {self.price:,.2f}"
        return f"{self.tokens:,} tokens: {hours_text(self.hours)} hours, {hours_text(self.gpu_hours)} GPU-hours{price}"

    def as_dict(self) -> dict[str, float | int | None]:
        """As JSON has it."""
        return {
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "price": self.price,
        }


def cost_of(plan: Plan, tokens: int, price_per_gpu_hour: float | None = None) -> Cost | None:
    """None where the rates of the GPUs are not known."""
    if plan.tokens_per_second is None:
        return None
    return Cost(tokens, plan.tokens_per_second, plan.topology.world_size, price_per_gpu_hour)


def cost_of_reference(cost: Cost, work: Workload, gpu: Gpu) -> Cost:
    """Of the forwards through the model that a run starts from, before its first step, if it reads each token once: of
    a step's time the part that a forward has of all products and attention that are computed."""
    rates, attained = rates_of(work, gpu), gpu.attained
    of_matrices, of_attention = rates.matrices * attained.matrices, rates.attention_forward * attained.attention
    once = forward_matrix_flops(work) / of_matrices + attention_forward_flops(work) / of_attention
    forward, backward = attention_flops(work)
    all_of_it = matrix_flops(work) / of_matrices
    all_of_it += forward / of_attention + backward / (rates.attention_backward * attained.attention)
    return replace(cost, tokens_per_second=cost.tokens_per_second * all_of_it / once)


def cost_of_mix(costs: list[Cost], shares: list[float], tokens: int) -> Cost:
    """Of a run whose tokens are of several lengths, in these shares, which sum to 1."""
    seconds = sum(share / cost.tokens_per_second for share, cost in zip(shares, costs, strict=True))
    return Cost(tokens, 1 / seconds, costs[0].gpus, costs[0].price_per_gpu_hour)


def hours_text(hours: float) -> str:
    """To a tenth, or below one in two digits."""
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"


def seconds_text(seconds: float, *, sign: Literal["", "+"] = "") -> str:
    """In three digits, or all before the point.

    Args:
        sign: "+": also of what is above 0.
    """
    # From here on three digits would be an exponent.
    return f"{seconds:{sign},.0f}" if abs(seconds) >= 999.5 else f"{seconds:{sign}.3g}"
