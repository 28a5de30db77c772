"""The planner's result: named memory terms, in phases, of one rank."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from mst_ds.settings import Settings
from mst_ds.topology import Topology

Place: TypeAlias = Literal["device", "host", "nvme"]
# State: parameters, gradients, optimizer, and ZeRO's buffers for them, whatever a micro-batch computes. Activation: all
# tensors that it does. Workspace: what a kernel allocates for itself. Reserve: what no tensor has.
Kind: TypeAlias = Literal["state", "activation", "workspace", "reserve"]


class MemoryTerm(NamedTuple):
    """One thing that occupies memory: how many bytes, where, of what kind, and the named factors that gave them.

    A tuple, because a search makes some hundred thousand of them.
    """

    name: str
    bytes: int
    place: Place
    factors: tuple[tuple[str, int], ...]
    kind: Kind = "activation"

    @property
    def formula(self) -> str:
        """As people read it; made on demand, because a search makes many more terms than are read."""
        return " x ".join(f"{label} {value}" for label, value in self.factors if value != 1)


def product_term(name: str, place: Place, *factors: tuple[str, int], kind: Kind = "activation") -> MemoryTerm:
    """A term that is the product of named factors, so that its formula cannot differ from its bytes."""
    count = 1
    for _, value in factors:
        count *= value
    return MemoryTerm(name, count, place, factors, kind)


# All but the reserve and activations.
state_term = functools.partial(product_term, kind="state")


def total_bytes(terms: Iterable[MemoryTerm]) -> int:
    return sum([term.bytes for term in terms])


@dataclass(frozen=True)
class Phase:
    """A moment of a step: what is alive together at its highest point."""

    name: str
    terms: tuple[MemoryTerm, ...]

    @property
    def device_bytes(self) -> int:
        return self._bytes("device")

    @property
    def host_bytes(self) -> int:
        return self._bytes("host")

    def kind_bytes(self, kind: Kind, place: Place = "device") -> int:
        return total_bytes(term for term in self.terms if term.place == place and term.kind == kind)

    def _bytes(self, place: Place) -> int:
        return sum([term.bytes for term in self.terms if term.place == place])


@dataclass(frozen=True)
class Choice:
    """What a setting of a plan costs (above 0) and saves (below 0), against its opposite, or one group of heads, or one
    chunk of a layer.

    Attributes:
        setting, value: a key of the "mst" block, and what the plan has for it.
        device_bytes, host_bytes: at the peak.
        flops: computed again in a micro-batch.
        copied_bytes: over the link between device and host, both ways, in a micro-batch.
        seconds: of a step, as predicted; None where the devices' rates are not known.
    """

    setting: str
    value: bool | int
    device_bytes: int
    host_bytes: int
    flops: int
    copied_bytes: int
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one rank executes, and what that is forecast to cost. Lengths are in tokens, memory in bytes.

    dtype is the model's ("fp32", "fp16" or "bf16"); phases are in the order in which they happen; choices say what each
    setting costs and saves; flops are those of matrix products and attention in a micro-batch of this rank.
    counts_are_exact, layers_as_attention: see `ModelShape`.

    predicted_step_seconds and predicted_mfu (model FLOPs utilisation, a share of 1) are by the rates of the GPU that is
    planned for, None where that is not known.
    """

    settings: Settings
    topology: Topology
    seq_len: int
    shard_length: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    zero_stage: int
    dtype: str
    device_memory: int
    host_memory: int | None
    phases: tuple[Phase, ...]
    counts_are_exact: bool
    layers_as_attention: tuple[str, ...]
    choices: tuple[Choice, ...]
    flops: int
    predicted_step_seconds: float | None
    predicted_mfu: float | None

    @property
    def sp_size(self) -> int:
        return self.topology.sp_size

    @property
    def sp_rank(self) -> int:
        return self.topology.sp_rank

    @property
    def dp_size(self) -> int:
        return self.topology.dp_size

    @property
    def samples_per_step(self) -> int:
        return self.micro_batch_size * self.gradient_accumulation_steps * self.dp_size

    @property
    def tokens_per_second(self) -> float | None:
        """Of all ranks, as predicted; None where `predicted_step_seconds` is."""
        seconds = self.predicted_step_seconds
        return None if seconds is None else self.samples_per_step * self.seq_len / seconds

    @property
    def dp_rank(self) -> int:
        return self.topology.dp_rank

    @property
    def peak_phase(self) -> Phase:
        """The phase that needs most device memory; of equal ones the first."""
        return max(self.phases, key=lambda phase: phase.device_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.peak_phase.device_bytes

    @property
    def host_bytes(self) -> int:
        """Host memory at its highest."""
        return max(phase.host_bytes for phase in self.phases)

    def as_dict(self) -> dict[str, Any]:
        """Everything as a JSON file holds it: the settings beside the rest, of each phase its bytes, of each term its
        formula."""
        # It would copy every factor of every term.
        fields = dataclasses.asdict(dataclasses.replace(self, phases=()))
        fields |= fields.pop("settings")
        fields["phases"] = [
            {
                "name": phase.name,
                "terms": [
                    {
                        "name": term.name,
                        "kind": term.kind,
                        "bytes": term.bytes,
                        "place": term.place,
                        "formula": term.formula,
                    }
                    for term in phase.terms
                ],
                "device_bytes": phase.device_bytes,
                "host_bytes": phase.host_bytes,
            }
            for phase in self.phases
        ]
        return fields

    @property
    def fits(self) -> bool:
        """Whether the device holds it, and the host, where its memory is known."""
        is_on_host = self.host_memory is None or self.host_bytes <= self.host_memory
        return is_on_host and self.peak_bytes <= self.device_memory
