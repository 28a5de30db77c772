"""Finds configs: by shipped name, folder or Hugging Face id."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mst_ds.config import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SHIPPED_CONFIGS = Path(__file__).parents[1] / "model_configs"


def shipped_model_config(name: str) -> Path | None:
    """The folder of a config that ships with the package, or None."""
    return _SHIPPED_CONFIGS / name if name in _shipped_names() else None


def load_model_config(name_or_path: str) -> PreTrainedConfig:
    """Finds a config by shipped name, folder, or Hugging Face id, in this order.

    Raises:
        ValueError: found in none of these places, or not a config that transformers can read.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    shipped = shipped_model_config(name_or_path)
    folder = shipped or Path(name_or_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model folder {name_or_path!r} has no config.json; allowed: a folder with one")
    try:
        with _logged_if_found():
            return AutoConfig.from_pretrained(str(folder) if folder.is_dir() else name_or_path)
    except (OSError, ValueError, KeyError, ZeroDivisionError, StrictDataclassError) as error:
        names = _shipped_names()
        if folder.is_dir():
            # Errors of validation have their reason in the second line; that of an unknown type goes on for pages.
            is_of_field = isinstance(error, StrictDataclassError)
            reason = " ".join(str(error).split()) if is_of_field else str(error).partition("\n")[0]
            raise ValueError(f"model config {folder / 'config.json'} cannot be read: {reason}") from None
        raise ValueError(
            f"model {name_or_path!r} was not found{nearest(name_or_path, names)}; allowed: a shipped config "
            f"({', '.join(names)}), a folder with a config.json, or a Hugging Face id that can be reached"
        ) from None


@contextmanager
def _logged_if_found() -> Iterator[None]:
    """What the hub's client logs of its requests is said afterwards, and not where the model is found nowhere: then the
    error says it, and each retry would be two more lines."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield
    finally:
        logger.removeFilter(hold)
    for record in held:
        logger.handle(record)


def _shipped_names() -> list[str]:
    return sorted(path.parent.name for path in _SHIPPED_CONFIGS.glob("*/config.json"))
