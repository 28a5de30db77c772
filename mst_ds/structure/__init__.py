"""Finds the parts of a decoder that can be chunked, by what they compute and not by what they are called."""

from mst_ds.structure.document_rotary import DocumentLengths, DocumentRotary, find_document_rotary
from mst_ds.structure.eager import find_eager_attention
from mst_ds.structure.indexers import IndexerStructure, find_indexers
from mst_ds.structure.layers import decoder_layers
from mst_ds.structure.loss import LossStructure, RouterLoss, find_decoder, loss_structure
from mst_ds.structure.mixers import Mixer, find_mixers, is_attention
from mst_ds.structure.mlps import Chunkable, ExpertsStructure, MlpStructure, TokenwiseStructure, find_mlps
from mst_ds.structure.norms import NormStructure, find_norms
from mst_ds.structure.positions import begins_with_each_document, position_table
from mst_ds.structure.rotary import RotaryStructure, find_rotary
from mst_ds.structure.shardable import has_whole_layers, require_shardable, why_own_attention

__all__ = [
    "Chunkable",
    "DocumentLengths",
    "DocumentRotary",
    "ExpertsStructure",
    "IndexerStructure",
    "LossStructure",
    "Mixer",
    "MlpStructure",
    "NormStructure",
    "RotaryStructure",
    "RouterLoss",
    "TokenwiseStructure",
    "begins_with_each_document",
    "decoder_layers",
    "find_decoder",
    "find_document_rotary",
    "find_eager_attention",
    "find_indexers",
    "find_mixers",
    "find_mlps",
    "find_norms",
    "find_rotary",
    "has_whole_layers",
    "is_attention",
    "loss_structure",
    "position_table",
    "require_shardable",
    "why_own_attention",
]
