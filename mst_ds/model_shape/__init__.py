"""Dimensions and parameter counts of a decoder, from its Hugging Face config alone: no weights, no torch."""

from mst_ds.model_shape.configs import (
    load_model_config,
    quantization_fields,
    raw_model_config,
    require_no_pointers,
    shipped_model_config,
)
from mst_ds.model_shape.counts import TrainedCounts
from mst_ds.model_shape.experts import ExpertShape
from mst_ds.model_shape.families import NormKind
from mst_ds.model_shape.known_models import known_model_names, load_config_of_shape, load_model_shape
from mst_ds.model_shape.layer_kinds import layer_kinds, other_layers
from mst_ds.model_shape.layers import LayerShape
from mst_ds.model_shape.mixers import MixerShape
from mst_ds.model_shape.model_flops import attended_pairs, flops_per_token
from mst_ds.model_shape.multimodal import language_config, with_language_config
from mst_ds.model_shape.positions import require_positions, unknown_positions
from mst_ds.model_shape.rope_scaling import parse_rope_scaling, scale_rope
from mst_ds.model_shape.shape import ModelShape, NormShape, has_two_alibis
from mst_ds.model_shape.state_space import read_state_space

__all__ = [
    "ExpertShape",
    "LayerShape",
    "MixerShape",
    "ModelShape",
    "NormKind",
    "NormShape",
    "TrainedCounts",
    "attended_pairs",
    "flops_per_token",
    "has_two_alibis",
    "known_model_names",
    "language_config",
    "layer_kinds",
    "load_config_of_shape",
    "load_model_config",
    "load_model_shape",
    "other_layers",
    "parse_rope_scaling",
    "quantization_fields",
    "raw_model_config",
    "read_state_space",
    "require_no_pointers",
    "require_positions",
    "scale_rope",
    "shipped_model_config",
    "unknown_positions",
    "with_language_config",
]
