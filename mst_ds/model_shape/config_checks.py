"""Configs that are not of a decoder of text, or with numbers that no model can have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Far above every model there is: what is larger is a mistake, and would take hours to build or overflow.
_MOST_OF_A_SIZE = 2**31
_MOST_LAYERS = 10**4
_MOST_EXPERTS = 2**16
_MOST_PARAMETERS = 10**15


class ConfigValueError(ValueError):
    """A value of a config that transformers has read and no model can have."""


def check_is_decoder(config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: an encoder, with a decoder or without, or a model of more than text.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    # Encoders such as BERT are in the mapping too, for those who set their is_decoder.
    is_decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and (
        type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False)
    )
    if config.is_encoder_decoder or not is_decoder:
        raise ValueError(
            f"model type {config.model_type!r} is not a decoder; allowed: decoder-only causal language "
            "models such as llama, qwen3, mistral, gemma2"
        )
    others = [name for name in type(config).sub_configs if name.startswith(("vision", "audio"))]
    if others and config.get_text_config() is config:
        raise ValueError(
            f"model type {config.model_type!r} is multimodal, with its {others[0]}; allowed: decoders of text alone"
        )
    if (text := config.get_text_config()) is not config:
        raise ValueError(
            f"model type {config.model_type!r} is multimodal; allowed: decoders of text alone, such as its part "
            f"{text.model_type!r}"
        )


def check_numbers(config: PreTrainedConfig) -> None:
    """Look at every number of a config that transformers has read.

    Raises:
        ConfigValueError: one is NaN, a size is larger than any model's, a dropout or a norm's epsilon is out of its
            range, the padding id is no token, or the rotary embedding is of an unknown type.
    """
    kind = config.model_type
    for name, value in _numbers(config.to_dict()):
        if isinstance(value, float) and math.isnan(value):
            _refuse(kind, name, value, "a number")
        if isinstance(value, int) and value > _MOST_OF_A_SIZE:
            _refuse(kind, name, value, f"a whole number of at most {_MOST_OF_A_SIZE}")
        last = name.rpartition(".")[2]
        if ("dropout" in last or last.endswith("pdrop")) and not 0 <= value < 1:
            _refuse(kind, name, value, "a number from 0 up to, not including, 1")
        if last.endswith(("_eps", "epsilon")) and not 0 < value <= 1:
            _refuse(kind, name, value, "a number > 0 and at most 1")
        if last in ("rope_theta", "rotary_emb_base") and not 0 < value < math.inf:
            _refuse(kind, name, value, "a number > 0")
        if last == "max_position_embeddings" and value < 1:
            _refuse(kind, name, value, "a whole number >= 1")
        if "experts" in last and last.startswith(("num_", "n_")) and value > _MOST_EXPERTS:
            _refuse(kind, name, value, f"a whole number of at most {_MOST_EXPERTS}")
    _check_rotary_type(config)
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        _refuse(kind, "num_hidden_layers", layers, f"a whole number of at most {_MOST_LAYERS}")
    padding, vocabulary = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if not isinstance(padding, int) or not isinstance(vocabulary, int) or vocabulary < 1:
        return
    if not -1 <= padding < vocabulary:
        _refuse(kind, "pad_token_id", padding, f"null, or a token of the vocabulary, 0 to {vocabulary - 1}")


def _check_rotary_type(config: PreTrainedConfig) -> None:
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, Mapping) or getattr(config, "auto_map", None):
        return
    types = [each.get("rope_type") for each in (parameters, *parameters.values()) if isinstance(each, Mapping)]
    for found in {str(each) for each in types if each not in (None, "default")}:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if found not in ROPE_INIT_FUNCTIONS:
            _refuse(
                config.model_type,
                "rope_parameters.rope_type",
                found,
                f"default, {', '.join(ROPE_INIT_FUNCTIONS)}",
            )


def check_parameter_count(kind: str, count: int) -> None:
    """Make sure that some machine can hold the model.

    Raises:
        ValueError: it has more parameters than any.
    """
    if count > _MOST_PARAMETERS:
        raise ValueError(
            f"the config of model type {kind!r} has the sizes of {count:.1e} parameters; allowed: at most "
            f"{_MOST_PARAMETERS:.0e}"
        )


def _numbers(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float]]:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def _refuse(kind: str, name: str, value: object, allowed: str) -> None:
    raise ConfigValueError(f"{name} in the config of model type {kind!r} is {value!r}; allowed: {allowed}")
