"""A model with its weights, or with random ones where there are none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from mst_ds.model_folder.contents import Weights
from mst_ds.model_folder.generation import generation_config
from mst_ds.model_folder.match import Difference, head_names
from mst_ds.model_folder.rows import add_rows, with_vocab_size
from mst_ds.model_folder.tensors import StoredTensors
from mst_ds.model_folder.whole import WholeModel

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


def load_model(
    weights: Weights | None,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    new_lm_head: bool = False,
    stored_vocab_size: int | None = None,
    seed: int = 0,
    whole: WholeModel | None = None,
) -> PreTrainedModel:
    """A model of `config` in `dtype`. Under ZeRO-3 sharded from the start, which is a collective call.

    Args:
        weights: as `require_match` has found them right; None: random ones.
        config: without quantisation, which the model does not have once it is loaded.
        model_class: what transformers makes of the config.
        attention: the implementation; None leaves it to transformers.
        new_lm_head: whether the LM head starts from random values.
        stored_vocab_size: the rows that the weights have for tokens, where `config` has more; see `add_rows`.
        seed: of the other rows.
        whole: the multimodal model whose `weights` these are, and whose language model is loaded.

    Raises:
        ValueError: what was loaded is not all that the model needs, or more than that.
    """
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if weights is None:
        random: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **settings)
        return random
    vocab_size = config.get_text_config().vocab_size
    has_all_rows = stored_vocab_size in (None, vocab_size)
    stored_config = config if has_all_rows else with_vocab_size(config, stored_vocab_size or 0)
    settings |= {"config": stored_config, "output_loading_info": True}
    load: Any = model_class.from_pretrained  # a pair, with its loading_info, which its annotation does not know
    if weights.quantization is None and whole is None:
        model, info = load(weights.source, **settings)
    else:
        with StoredTensors(weights.files) as stored:
            # Sharded, the others get their values from the first rank.
            has_values = not is_deepspeed_zero3_enabled() or dist.get_rank() == 0
            plain: Mapping[str, Tensor] = stored if has_values else weights.headers
            if weights.quantization is not None:
                plain = weights.quantization.dequantize(plain, dtype)
            if whole is not None:
                plain = whole.language_part(plain)
            # From no folder: transformers would remember how they were quantised, and quantise them when it saves.
            model, info = load(None, state_dict=plain, generation_config=generation_config(weights.source), **settings)
        model.name_or_path = model.config.name_or_path = weights.source
    Difference.of(info).require_none(weights.source, head=head_names(model), new_lm_head=new_lm_head)
    loaded: PreTrainedModel = model
    _keep_names(loaded)
    if not has_all_rows:
        add_rows(loaded, vocab_size, seed=seed)
    return loaded


def _keep_names(model: PreTrainedModel) -> None:
    """Have the model saved with the names that it was loaded with.

    transformers undoes the renames of the load when it saves: under ZeRO-3 also those that had nothing to rename, such
    as the prefix that the weights have where they are a part of a larger checkpoint.
    """
    loaded: Any = model
    if (renames := getattr(loaded, "_weight_conversions", None)) is not None:
        loaded._weight_conversions = [rename for rename in renames if rename.was_used()]
