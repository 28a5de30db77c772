"""Every knob that a run executes, once: its type, what the `"mst"` block may say, what `"auto"` chooses from.

A knob is a field of `Settings`. The checks of the `"mst"` block, the candidates of the planner's search, the comparison
of the ranks of a sequence, what a preflight tries, the printed description and the table in the README are read from
it; `docs/extending.md` shows how one is added. `python -m mst_ds.settings` prints the table.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mst_ds.config import ATTENTION_IMPLEMENTATIONS, AUTO, MOST_TOKENS, Auto, nearest

# More memory than any machine has; its bytes fit into 64 bits.
_MOST_GIB = 2**30


@dataclass(frozen=True)
class Knob:
    """What there is to know of one field of `Settings`.

    Attributes:
        values, auto: what the README says of it, and of `"auto"`.
        allowed: the same in the few words of an error.
        is_allowed: whether a value other than `"auto"` is.
        choices: what `"auto"` chooses from by search; of values with which a step is equally fast the first is taken.
            Empty where `"auto"` follows from the model, the ranks and the lengths.
        off: the value with which it does nothing: of a switch false, of a count 1.
        needs_recompute: whether it says something of how layers are computed again, and is off without recompute.
        needs_sharding: whether it is without effect on a sequence that is not sharded.
        ranks_agree: whether the ranks of a sequence would wait for each other, or worse, if they differed in it.
        tried: what each of a preflight's four cases has, in their order; of `sp_size` with what each is tried.
        several: the least number that stands for any greater one in a comparison of results; 0: it is no number.
    """

    values: str
    auto: str
    allowed: str
    is_allowed: Callable[[object], bool]
    off: object = None
    choices: tuple[bool, ...] = ()
    needs_recompute: bool = False
    needs_sharding: bool = False
    ranks_agree: bool = False
    tried: tuple[Any, ...] = ()
    several: int = 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_TOKENS


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _count(values: str, auto: str, **rest: Any) -> Any:
    knob = Knob(values, auto, "a whole number >= 1", _is_count, off=1, **rest)
    return field(default=1, metadata={"knob": knob})


def _switch(values: str, auto: str, **rest: Any) -> Any:
    knob = Knob(f"`true`, `false`: {values}", auto, "true or false", _is_bool, off=False, **rest)
    return field(default=False, metadata={"knob": knob})


def _word(values: tuple[str, ...], auto: str) -> Any:
    listed = ", ".join(f'`"{value}"`' for value in values)
    knob = Knob(listed, auto, " or ".join(values), lambda value: value in values)
    return field(default=values[0], metadata={"knob": knob})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one rank executes. Without recompute, `keep_attention` and `offload_activations` are False, and
    `layer_chunks` is 1."""

    sp_size: int = _count(
        "sequence parallelism: ranks that share a sequence; divides the world size, at most the number of query heads",
        "the fastest that fits; unknown devices: a node's ranks",
        tried=(1, 2),
        several=2,
    )
    layer_chunks: int = _count(
        "chunks in which a whole decoder layer is worked through, of a rank, 1 or more; the ranks of a sequence have "
        "equally many",
        "1 where a layer fits, else the fewest that fit; without recompute 1",
        needs_recompute=True,
        ranks_agree=True,
        tried=(1, 1, 4, 16),
        several=3,  # a first one, one in between and a last
    )
    mlp_chunks: int = _count(
        "chunks of the MLP within a chunk of the layer, of a rank, 1 or more",
        "the fewest with which the MLP no longer makes the peak, on a known GPU of 2048 tokens or more; then "
        "the fewest that fit",
        tried=(1, 4, 4, 64),
        several=3,
    )
    loss_chunks: int = _count(
        "chunks of the LM head and the loss, of a rank, 1 or more",
        "the fewest with which the loss no longer makes the peak, on a known GPU of 2048 tokens or more; then "
        "the fewest that fit",
        tried=(1, 4, 4, 64),
        several=3,
    )
    recompute: bool = _switch(
        "activation checkpointing: drop a layer's activations and compute them again in the backward, but never the "
        "MLP's forward",
        "`true` if they do not fit",
        choices=(False, True),
        ranks_agree=True,
        tried=(True, False, True, True),
    )
    keep_attention: bool = _switch(
        "keep attention's output and log-sum-exp, so that recompute does not run attention again",
        "with recompute, `true` if it fits",
        choices=(True, False),
        needs_recompute=True,
        ranks_agree=True,
        tried=(False, False, True, True),
    )
    offload_activations: bool = _switch(
        "what recompute keeps lies in pinned memory of the host, two layers' or chunks' worth of it on the device",
        "with recompute, `true` if it does not fit otherwise and the host has room",
        choices=(False, True),
        needs_recompute=True,
        tried=(False, False, False, True),
    )
    keep_mlp: bool = _switch(
        "keep gate and up of each MLP too, so that its backward computes nothing again; experts and MLPs with adapters "
        "keep nothing",
        "`true` if it fits on the device and the step is predicted to be faster",
        choices=(True, False),
        tried=(False, True, False, True),
    )
    head_groups: int = _count(
        "with `sp_size` above 1, attention gathers its heads in so many groups, one after another",
        "the fewest with which attention does not make the peak",
        needs_sharding=True,
        ranks_agree=True,
        tried=(1, 1, 1, 2),
        several=2,
    )
    attention: str = _word(
        ATTENTION_IMPLEMENTATIONS, '`"sdpa"`; for softcapped scores in 16 bits flash-attn 2, if it is installed'
    )

    def __str__(self) -> str:
        """By the names of the `"mst"` block, without what is off: "sp_size 2, …, recompute, attention sdpa"."""
        values = dataclasses.asdict(self)
        return ", ".join(_described(name, value) for name, value in values.items() if value is not False)


def _described(name: str, value: object) -> str:
    if value is True:
        return name
    return f"{name} {value}"


KNOBS: Mapping[str, Knob] = {each.name: each.metadata["knob"] for each in dataclasses.fields(Settings)}


def candidates(given: Mapping[str, Any]) -> Iterator[dict[str, bool]]:
    """Values for all knobs that a search chooses, those of `given` as they are; what is preferred comes first."""
    searched = {name: knob for name, knob in KNOBS.items() if knob.choices}
    for values in itertools.product(*(knob.choices for knob in searched.values())):
        chosen = dict(zip(searched, values, strict=True))
        if any(given.get(name, value) != value for name, value in chosen.items()):
            continue
        if chosen["recompute"] or not _of_recompute({**given, **chosen}):
            yield chosen


def _of_recompute(values: Mapping[str, Any]) -> list[str]:
    """The knobs among `values` that are on and mean something with recompute alone."""
    return [name for name, knob in KNOBS.items() if knob.needs_recompute and values.get(name, knob.off) != knob.off]


@dataclass(frozen=True)
class MstConfig:
    """The `"mst"` block of the DeepSpeed JSON: what the user settled, and the memory to plan for.

    given: knobs and their values; all others are the planner's to choose.
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    device_memory_gib: float | Auto = AUTO
    reserve_gib: float | Auto = AUTO

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> MstConfig:
        """Checks the block; a key that it leaves out is `"auto"`.

        Raises:
            ValueError: not a mapping, an unknown key, a value of the wrong type or range, or a setting of how layers
                are computed again without recompute.
        """
        if not isinstance(block, Mapping):
            raise ValueError(f"'mst' is {block!r}; allowed: an object with the keys {', '.join(_CHECKS)}")
        for key, value in block.items():
            if key not in _CHECKS:
                near = nearest(key, _CHECKS)
                raise ValueError(f"'mst' has the unknown key {key!r}{near}; allowed: {', '.join(_CHECKS)}")
            is_allowed, allowed = _CHECKS[key]
            if value != AUTO and not is_allowed(value):
                raise ValueError(f"{key} in 'mst' is {value!r}; allowed: 'auto' or {allowed}")
        settled = {key: value for key, value in block.items() if value != AUTO}
        if settled.get("recompute") is False:
            for name in _of_recompute(settled):
                raise ValueError(
                    f"{name} in 'mst' is {settled[name]}, but recompute is False and layers keep everything; "
                    f"allowed: 'auto' or {str(KNOBS[name].off).lower()}, or recompute true"
                )
        memory = {name: settled.pop(name) for name in _MEMORY if name in settled}
        return cls(settled, **memory)

    def get(self, name: str) -> Any:
        """The value of a knob, or `"auto"`."""
        return self.given.get(name, AUTO)


def _is_number_from_0(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST_GIB


# What is no knob: a run does not execute it. Its checks, and its row in the README's table.
_MEMORY: Mapping[str, tuple[Callable[[object], bool], str, str, str]] = {
    "device_memory_gib": (
        lambda value: _is_number_from_0(value) and value != 0,
        "a number > 0",
        "memory to plan for, per rank",
        "the device's; on a CPU an equal part of the machine's, or of what its container or job may use",
    ),
    "reserve_gib": (
        _is_number_from_0,
        "a number >= 0",
        "of that, what is left to CUDA's context, NCCL's buffers and the allocator's losses",
        "2; on a CPU 0",
    ),
}
_CHECKS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    **{name: (knob.is_allowed, knob.allowed) for name, knob in KNOBS.items()},
    **{name: (is_allowed, allowed) for name, (is_allowed, allowed, *_) in _MEMORY.items()},
}


def table() -> str:
    """The keys of the `"mst"` block as a table in Markdown."""
    rows = [("key", "values", '`"auto"`'), ("---", "---", "---")]
    rows += [(f"`{name}`", knob.values, knob.auto) for name, knob in KNOBS.items()]
    rows += [(f"`{name}`", values, auto) for name, (_, _, values, auto) in _MEMORY.items()]
    return "\n".join(f"| {' | '.join(row)} |" if row[0] != "---" else "|---|---|---|" for row in rows)


if __name__ == "__main__":
    print(table())
