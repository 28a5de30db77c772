"""How a model generates, which its folder says in a file of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig


def generation_config(source: str) -> GenerationConfig | None:
    """That of a model folder or Hugging Face id; None where it has none.

    Raises:
        ValueError: it has one with which transformers would not load the model.
    """
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source)
    except Exception as error:  # of a value of another type, whatever comes of it
        # What is no JSON transformers takes for a file that is not there.
        if isinstance(error, OSError) and not isinstance(error.__context__, ValueError):
            return None
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"generation_config.json of model {source!r} cannot be read ({reason}); allowed: one as transformers "
            "writes it, or none"
        ) from None
