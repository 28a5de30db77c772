"""Published models whose shapes are known without a download, and without the seconds that transformers takes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from mst_ds.model_shape.configs import load_model_config
from mst_ds.model_shape.multimodal import language_config
from mst_ds.model_shape.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Hugging Face id -> of its config.json what decides shapes, with nothing left to a default of transformers; or the id
# of the model whose shape it has.
_FILE = Path(__file__).with_name("known_models.json")


def known_model_names() -> list[str]:
    """Hugging Face ids, as `load_model_shape` takes them."""
    return sorted(json.loads(_FILE.read_text(encoding="utf-8")))


def load_config_of_shape(name_or_path: str) -> PreTrainedConfig:
    """A config with the shape of a known model, the rest as transformers has it; of any other `load_model_config`'s,
    or of a multimodal one its language model's.

    Raises:
        ValueError: found nowhere.
    """
    fields = _fields(name_or_path)
    if fields is None:
        return language_config(load_model_config(name_or_path))
    from transformers import AutoConfig

    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def load_model_shape(name_or_path: str) -> ModelShape:
    """The shape of a known model; of any other that of `load_config_of_shape`.

    Raises:
        ValueError: found nowhere, or not a decoder-only causal language model.
    """
    fields = _fields(name_or_path)
    if fields is not None:
        return ModelShape.from_fields(SimpleNamespace(**fields))
    return ModelShape.from_config(load_config_of_shape(name_or_path))


def _fields(name: str) -> dict[str, Any] | None:
    models: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    found = models.get(name)
    return cast("dict[str, Any] | None", models[found] if isinstance(found, str) else found)
