"""RoPE scaled for sequences that are longer than those that a model was made for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mst_ds.config import nearest
from mst_ds.model_shape.positions import rotary_entries
from mst_ds.model_shape.sizes import optional_size

_TYPES = ("yarn", "linear", "dynamic")
_MOST_FACTOR = 1e6


@dataclass(frozen=True)
class RopeScaling:
    """A `rope_type` of transformers and its factor, by which there are more positions than before: YaRN (arXiv
    2309.00071), linear interpolation (arXiv 2306.15595), or NTK-aware scaling that follows the length."""

    rope_type: str
    factor: float

    def __str__(self) -> str:
        return f"{self.rope_type}:{self.factor:g}"


def parse_rope_scaling(text: str) -> RopeScaling:
    """Reads `"yarn:4"`.

    Raises:
        ValueError: an unknown type, or no factor above 1.
    """
    rope_type, _, number = text.strip().partition(":")
    if rope_type not in _TYPES:
        raise ValueError(
            f"rope_scaling is {text!r}; allowed: {' or '.join(_TYPES)} and a factor, such as yarn:4"
            f"{nearest(rope_type, _TYPES)}"
        )
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not 1 < factor <= _MOST_FACTOR:
        raise ValueError(f"rope_scaling is {text!r}; allowed: a factor above 1, such as {rope_type}:4")
    return RopeScaling(rope_type, factor)


def scale_rope(config: Any, scaling: RopeScaling) -> None:
    """Write the scaling into a model's config, which a model that is made of it, and saved, then has.

    Rotary embeddings of layers with a sliding window stay as they are: they see no more tokens than before.

    Raises:
        ValueError: the model has no RoPE, or one that is scaled by another type.
    """
    known, entries = optional_size(config, "max_position_embeddings"), rotary_entries(config)
    if known is None or not entries:
        raise ValueError(
            f"rope_scaling is {scaling}, but a model of type {config.model_type!r} has no rotary embeddings that could "
            "be scaled; allowed: no --rope_scaling"
        )
    for entry in entries:
        before = entry.get("rope_type", "default")
        if before not in ("default", scaling.rope_type):
            raise ValueError(
                f"rope_scaling is {scaling}, but the model's RoPE is scaled already, by {before!r} with a factor of "
                f'{entry.get("factor")}; allowed: no --rope_scaling, or other "rope_parameters" in its config.json'
            )
        entry["rope_type"], entry["factor"] = scaling.rope_type, scaling.factor
        if scaling.rope_type == "yarn":
            original = entry.setdefault("original_max_position_embeddings", known)
            config.max_position_embeddings = int(original * scaling.factor)
