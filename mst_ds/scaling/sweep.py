"""What a sweep consists of: each combination of its sizes and variants is a point, a launch of its own."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mst_ds.config import TrainConfig
from mst_ds.config_parser import parse_train_config
from mst_ds.model_shape import load_model_shape
from mst_ds.topology import choose_sp_size
from mst_ds.zero import DsConfig, load_ds_config

# The first step is not counted: it compiles, allocates, and is measured phase by phase.
_LEAST_STEPS = 2


@dataclass(frozen=True)
class Variant:
    """A named variant of a run: what it changes of the "mst" block, of the other DeepSpeed keys, of the train flags."""

    name: str
    mst: Mapping[str, Any] = field(default_factory=dict)
    ds_config: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """One launch. `num_gpus` are the ranks of a node, on a CPU too; `seq_len` is in tokens."""

    num_nodes: int
    num_gpus: int
    sp_size: int
    seq_len: int
    variant: Variant

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.num_gpus

    @property
    def name(self) -> str:
        """Tells points of a sweep apart; the name of a folder."""
        return (
            f"nodes{self.num_nodes}-gpus{self.num_gpus}-sp{self.sp_size}-{short_length(self.seq_len)}-"
            f"{self.variant.name}"
        )

    def check_sp_size(self, num_attention_heads: int) -> None:
        """A sweep over whole ranges has combinations that no run can have.

        Raises:
            ValueError: `sp_size` does not divide the world, or leaves a rank without a query head.
        """
        choose_sp_size(self.sp_size, world_size=self.world_size, num_attention_heads=num_attention_heads)


@dataclass(frozen=True)
class Sweep:
    """Every combination of these. `train` are flags of all points, `time_limit` the minutes of each."""

    sp_sizes: tuple[int, ...]
    seq_lens: tuple[int, ...]
    num_nodes: tuple[int, ...]
    num_gpus: tuple[int, ...]
    variants: tuple[Variant, ...]
    train: Mapping[str, Any]
    time_limit: float

    @functools.cached_property
    def points(self) -> tuple[Point, ...]:
        """In the order of their numbers: the lengths of a curve one after another, the shortest first."""
        combinations = itertools.product(self.variants, self.num_nodes, self.num_gpus, self.sp_sizes, self.seq_lens)
        return tuple(Point(nodes, gpus, sp, length, variant) for variant, nodes, gpus, sp, length in combinations)

    def check(self) -> None:
        """Refuses what would be wrong in every point of a variant, before any runs.

        Raises:
            ValueError: a train flag, a key of the "mst" block or the DeepSpeed JSON is wrong, the model is not found or
                none that can be trained, or there are too few steps to measure one.
        """
        for variant in self.variants:
            # Any point stands for all: they differ in numbers that have been checked.
            point = next(point for point in self.points if point.variant is variant)
            config = self.train_config(point)
            if config.max_steps < _LEAST_STEPS:
                raise ValueError(
                    f"max_steps is {config.max_steps}, and the first is not measured; allowed: {_LEAST_STEPS} or more"
                )
            self.ds_config(point)
            load_model_shape(config.model)

    def flags(self, point: Point) -> dict[str, str]:
        """The train flags of a point, as text, without those that every point has its own of."""
        values = {**self.train, **point.variant.train}
        return {name: str(value) for name, value in values.items() if value is not None}

    def train_config(self, point: Point) -> TrainConfig:
        """What the train flags of a point mean, by themselves.

        Raises:
            ValueError: see `parse_train_config`.
        """
        return _train_config(tuple(self.flags(point).items()))

    def ds_config(self, point: Point) -> DsConfig:
        """The DeepSpeed JSON of a point: that of the flags, with the variant's keys over it.

        Raises:
            ValueError: see `load_ds_config`.
        """
        base = load_ds_config(self.train_config(point).ds_config)
        mst = {"mst": {**point.variant.mst, "sp_size": point.sp_size}}
        return load_ds_config(_merged(_merged(base, point.variant.ds_config), mst))


@functools.cache
def _train_config(flags: tuple[tuple[str, str], ...]) -> TrainConfig:
    return parse_train_config([f"--{name}={value}" for name, value in flags])


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; of two objects of one name the keys are merged in turn."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both_are_objects = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(below, value) if both_are_objects else value  # type: ignore[arg-type]
    return merged


def short_length(seq_len: int) -> str:
    """4096 as "4K", where K and M leave nothing over."""
    for factor, suffix in ((1024**2, "M"), (1024, "K")):
        if seq_len % factor == 0:
            return f"{seq_len // factor}{suffix}"
    return str(seq_len)
