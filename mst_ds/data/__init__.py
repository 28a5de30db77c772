"""From texts and chats to sharded batches: documents, tokens, packed samples, this rank's part of each batch."""

from mst_ds.config import IGNORE_INDEX
from mst_ds.data.loader import EvalLoader, Loading, ShardedLoader
from mst_ds.data.packing import PackedDataset, split_documents
from mst_ds.data.sharding import ON_HOST, Batch, shard, shift_labels, to_device
from mst_ds.data.shown import shown_samples
from mst_ds.data.text_source import load_documents
from mst_ds.data.tokenising import tokenise
from mst_ds.data.tokenizer import byte_tokenizer, load_tokenizer, rows_for
from mst_ds.data.training_data import TrainingData, describe, load_training_data

__all__ = [
    "IGNORE_INDEX",
    "ON_HOST",
    "Batch",
    "EvalLoader",
    "Loading",
    "PackedDataset",
    "ShardedLoader",
    "TrainingData",
    "byte_tokenizer",
    "describe",
    "load_documents",
    "load_tokenizer",
    "load_training_data",
    "rows_for",
    "shard",
    "shift_labels",
    "shown_samples",
    "split_documents",
    "to_device",
    "tokenise",
]
