"""The language model inside a multimodal model, by its config: it is what is planned, checked and trained."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def language_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of the language model alone, of a multimodal model that has one which transformers knows alone, too.

    Any other config is returned as it is: of a decoder of text, or one that `ModelShape.from_config` refuses.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    text = config.get_text_config()
    is_known = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING
    if text is config or config.is_encoder_decoder or not is_known:
        return config
    alone = copy.deepcopy(text)
    # The whole model's own says whether its head is tied: that of its part may differ, and be without effect.
    alone.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    return alone


def with_language_config(config: PreTrainedConfig, language: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a multimodal `config` whose language model is as `language`, which `language_config` gave, has become.

    What the config says of its part's head stays as it is: the whole model's own is what counts.
    """
    copied = copy.deepcopy(config)
    own = copied.get_text_config()
    part = copy.deepcopy(language)
    if hasattr(own, "tie_word_embeddings"):
        part.tie_word_embeddings = own.tie_word_embeddings
    for name in type(config).sub_configs:
        if getattr(copied, name, None) is own:
            setattr(copied, name, part)
    return copied
