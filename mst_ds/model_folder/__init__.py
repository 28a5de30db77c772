"""A model folder: what it holds, whether the model needs that, the model loaded from it, and how one is written."""

from mst_ds.model_folder.adapter import SavedAdapter, find_adapter
from mst_ds.model_folder.contents import Weights, find_weights
from mst_ds.model_folder.layout import ModelLayout
from mst_ds.model_folder.load import load_model
from mst_ds.model_folder.match import require_match
from mst_ds.model_folder.rows import with_vocab_size

__all__ = [
    "ModelLayout",
    "SavedAdapter",
    "Weights",
    "find_adapter",
    "find_weights",
    "load_model",
    "require_match",
    "with_vocab_size",
]
