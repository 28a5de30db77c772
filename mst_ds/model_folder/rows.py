"""Rows of the embedding, and of the LM head, for tokens that are added to a model."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

from transformers import set_seed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def with_vocab_size(config: PreTrainedConfig, vocab_size: int) -> PreTrainedConfig:
    """A copy of `config` whose model has so many rows."""
    copied = copy.deepcopy(config)
    copied.get_text_config().vocab_size = vocab_size
    return copied


def add_rows(model: PreTrainedModel, vocab_size: int, *, seed: int) -> None:
    """Give `model` so many rows: the new ones are drawn around the mean of the others, as transformers has it.

    Sharded by ZeRO-3 it is a collective call, after which these weights are whole on each rank, until DeepSpeed's
    engine shards them. Every rank draws the same rows, and `set_seed(seed)` before transformers'
    `resize_token_embeddings` gives them elsewhere.
    """
    set_seed(seed)
    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.level
    # How the new rows are drawn would be said once for each rank; the run says it once.
    logger.setLevel(logging.ERROR)
    try:
        model.resize_token_embeddings(vocab_size)
    finally:
        logger.setLevel(before)
