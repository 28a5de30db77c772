"""Where the tokens of a model meet: whether it can be exact on a shard, and on packed documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from mst_ds.model_shape import has_two_alibis, layer_kinds, other_layers
from mst_ds.structure.eager import find_eager_attention
from mst_ds.structure.indexers import find_indexers, takes_picks
from mst_ds.structure.layers import decoder_layers
from mst_ds.structure.mixers import find_mixers, is_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_shardable(model: PreTrainedModel) -> None:
    """Refuse what is not exact on a shard: tokens may meet in causal attention over all positions, and in what
    `find_mixers` and `find_indexers` find, nowhere else.

    Raises:
        ValueError: a model without transformers' attention interface, attention that is not causal, or layers that mix
            tokens in another way, such as a linear attention or a recurrence of a model's own.
    """
    name, advice = type(model).__name__, "use sp_size 1 for this model"
    if not _uses_interface(model):
        raise ValueError(
            f"{name} does not use transformers' attention interface, which sequence parallelism needs: {advice}"
        )
    config = model.config.get_text_config()
    # "vision": text is causal.
    is_bidirectional = getattr(config, "use_bidirectional_attention", False) in (True, "all")
    is_causal = getattr(config, "is_causal", True) and not is_bidirectional
    reason = _other_mixing(model) if is_causal else "attention that is not causal"
    if reason is not None:
        raise ValueError(f"{name} has {reason}, which sequence parallelism does not support: {advice}")


def why_own_attention(model: PreTrainedModel) -> str | None:
    """Why a model keeps its own attention, and takes one document a row, in words that follow its name.

    None where this project's attention keeps documents apart and hides padding, because tokens meet nowhere else.
    """
    if not _uses_interface(model):
        return "does not use transformers' attention interface, which packed documents need"
    reason = _other_mixing(model)
    return None if reason is None else f"has {reason}, which run on from one packed document into the next"


def _uses_interface(model: PreTrainedModel) -> bool:
    """Whether this project's attention can take the place of the model's: the model says so, or each layer calls it, or
    writes out what can be understood."""
    if model._supports_attention_backend:
        return True
    if has_two_alibis(model.config.get_text_config()):
        return False
    layers, with_mixer = decoder_layers(model), _layers_with_mixer(model)
    written_out = {attention.module for attention in find_eager_attention(model)}
    with_attention = [
        layer for layer in layers if any(is_attention(each) or each in written_out for each in layer.modules())
    ]
    if with_mixer:
        # Layers of several kinds: some may have neither.
        return bool(with_attention) or len(with_mixer) == len(layers)
    return bool(layers) and len(with_attention) == len(layers)


def _other_mixing(model: PreTrainedModel) -> str | None:
    """What besides attention, known mixers and indexers lets tokens meet; None where there is nothing."""
    config = model.config.get_text_config()
    others = [kind for kind in layer_kinds(config) if kind in other_layers(config)]
    if len(_layers_with_mixer(model)) + len(_layers_with_picks(model)) < len(others):
        return f"layers of type {', '.join(other_layers(config))}"
    inside = {module for mixer in find_mixers(model) for module in mixer.module.modules()}
    if any(isinstance(module, nn.Conv1d) and module not in inside for module in model.modules()):
        return "convolutions over the sequence"
    return None


def _layers_with_mixer(model: PreTrainedModel) -> list[nn.Module]:
    mixers = {mixer.module for mixer in find_mixers(model)}
    return [layer for layer in decoder_layers(model) if not mixers.isdisjoint(layer.modules())]


def _layers_with_picks(model: PreTrainedModel) -> list[nn.Module]:
    """Whose attention takes the picks of an indexer that is known, of this layer or of one before it."""
    if not find_indexers(model):
        return []
    return [layer for layer in decoder_layers(model) if any(map(takes_picks, layer.modules()))]


def has_whole_layers(model: PreTrainedModel) -> bool:
    """Whether layers are one chunk whatever a plan says: indexers, and some mixers, work on whole shards."""
    return not all(mixer.carries for mixer in find_mixers(model)) or bool(find_indexers(model))
