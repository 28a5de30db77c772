"""Whether a multimodal model computes on text what its language model alone computes, which is what trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mst_ds.model_folder import find_places, whole_on_meta
from mst_ds.model_shape import with_language_config
from mst_ds.preflight.errors import is_exact
from mst_ds.preflight.float64 import default_float64
from mst_ds.preflight.small_model import build_small_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

_ROWS, _LENGTH = 2, 41  # longer than the windows of a small model


def require_same_on_text(whole_config: PreTrainedConfig, language_config: PreTrainedConfig) -> None:
    """Compare the logits of both on the same random tokens, in float64, with a small language model.

    The other parts have no memory: on text they are not run.

    Raises:
        ValueError: they differ, or the whole model does not run on text alone; or the language model cannot be shrunk.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), default_float64():
        torch.manual_seed(0)
        language = build_small_model(language_config, seq_len=_LENGTH).eval()
        whole = whole_around(language, whole_config).eval()
        ids = _tokens(whole_config, language.config.vocab_size)
        expected = language(input_ids=ids).logits
        name = type(whole).__name__
        try:
            found = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        except Exception as error:  # whatever the model's class raises
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"preflight: {name} does not run on text alone: {reason}") from error
    worst = (found - expected).norm().item() / expected.norm().item()
    if not is_exact(worst):
        raise ValueError(
            f"preflight: {name} computes on text other than its language model alone does, "
            f"{type(language).__name__}, by {worst:.1e} of its logits; allowed: one for which both are the same"
        )


def whole_around(language: PreTrainedModel, whole_config: PreTrainedConfig) -> PreTrainedModel:
    """The multimodal model with `language` in it; its other parts have no memory.

    Raises:
        ValueError: it has no such part, or cannot be built.
    """
    config = with_language_config(whole_config, language.config)
    whole = whole_on_meta(config, torch.float64, attn_implementation="eager", experts_implementation="eager")
    for own, place in find_places(whole, language).items():
        parent, _, name = place.rpartition(".")
        setattr(whole.get_submodule(parent), name, language.get_submodule(own))
    return whole


def _tokens(whole_config: PreTrainedConfig, vocab_size: int) -> Tensor:
    """Random ones, none of which stands for an image or the like: (rows, length)."""
    others = {
        value
        for name, value in vars(whole_config).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    ids = torch.tensor([each for each in range(vocab_size) if each not in others])
    return ids[torch.randint(len(ids), (_ROWS, _LENGTH))]
