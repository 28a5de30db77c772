"""Reads sizes from a config, under whichever of several names a family gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def size(config: PreTrainedConfig, *names: str) -> int:
    """The first of these fields that is set.

    Raises:
        ValueError: none is, or it is not a whole number above 0.
    """
    found = optional_size(config, *names)
    if found is None:
        raise ValueError(
            f"{names[0]} in the config of model type {config.model_type!r} is {getattr(config, names[0], None)!r}; "
            "allowed: a whole number >= 1"
        )
    return found


def optional_size(config: PreTrainedConfig, *names: str, layer: int | None = None) -> int | None:
    """The first of these fields that is set; None where each is missing, None or 0.

    Args:
        layer: whose size it is, where a field has a list with one for each.

    Raises:
        ValueError: it is not a whole number above 0, such as a list with a size for each layer.
    """
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # transformers', for a field whose value is another in each layer
            value = "not the same in all layers"
        if layer is not None and isinstance(value, list | tuple) and layer < len(value):
            value = value[layer]
        if value is None or value == 0:
            continue
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{name} in the config of model type {config.model_type!r} is {value!r}; allowed: a whole number >= 1"
            )
        return value
    return None
