"""The datasets of a run, and which share of its documents each has."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mst_ds.config import TrainConfig
from mst_ds.files.read_file import expanded

_ALLOWED = "a weight with each dataset, as a.jsonl:0.7, which together make 1, or none"


@dataclass(frozen=True)
class Source:
    """One dataset: the run's request with it alone, and its share of the run's documents; None: all that it has."""

    config: TrainConfig
    weight: float | None

    @property
    def name(self) -> str:
        return self.config.dataset_name


def sources_of(config: TrainConfig) -> tuple[Source, ...]:
    """The datasets in the order in which they were given.

    Raises:
        ValueError: some have a weight and others none, a weight is no number > 0, or the weights do not make 1.
    """
    names = [config.dataset] if isinstance(config.dataset, str) else config.dataset
    parted = [_parted(name) for name in names]
    weights = [weight for _, weight in parted if weight is not None]
    if weights:
        for name, weight in parted:
            if weight is None:
                raise ValueError(f"dataset {name!r} has no weight, but another has; allowed: {_ALLOWED}")
            if not 0 < weight <= 1:
                raise ValueError(f"dataset {name!r} has the weight {weight:g}; allowed: {_ALLOWED}")
        if not math.isclose(sum(weights), 1, abs_tol=1e-6):
            raise ValueError(f"the weights of the datasets make {sum(weights):g}; allowed: {_ALLOWED}")
    return tuple(Source(config.changed(dataset=name), weight) for name, weight in parted)


def require_rows_that_mix(of_text: Iterable[tuple[str, bool]]) -> None:
    """Refuse texts beside rows that say what of them is learned.

    Args:
        of_text: the name of each dataset, and whether its rows are texts.

    Raises:
        ValueError: some are and others are not.
    """
    names: dict[bool, str] = {}
    for name, is_text in of_text:
        names.setdefault(is_text, name)
    if len(names) > 1:
        raise ValueError(
            f"dataset {names[True]!r} has texts, and {names[False]!r} rows of which a part is learned; allowed: texts "
            "alone, or any of chats, prompts with completions and ids"
        )


def _parted(text: str) -> tuple[str, float | None]:
    """A name and its weight. A file's name may have colons and numbers, too."""
    name, colon, number = text.rpartition(":")
    if not colon or not name or expanded(text, "dataset").exists():
        return text, None
    try:
        return name, float(number)
    except ValueError:
        return text, None
