"""A model folder: what it holds, whether the model needs that, the model loaded from it, and how one is written."""

from mst_ds.model_folder.adapter import SavedAdapter, find_adapter
from mst_ds.model_folder.contents import Weights, find_weights
from mst_ds.model_folder.layout import ModelLayout
from mst_ds.model_folder.load import load_model
from mst_ds.model_folder.match import find_whole, require_match
from mst_ds.model_folder.rows import with_vocab_size
from mst_ds.model_folder.whole import WholeModel
from mst_ds.model_folder.whole_class import find_places, whole_on_meta
from mst_ds.model_folder.write import fetch_processor_of

__all__ = [
    "ModelLayout",
    "SavedAdapter",
    "Weights",
    "WholeModel",
    "fetch_processor_of",
    "find_adapter",
    "find_places",
    "find_weights",
    "find_whole",
    "load_model",
    "require_match",
    "whole_on_meta",
    "with_vocab_size",
]
