"""At which sizes a session measures: those of a GPU, and small ones with which a CPU runs the same code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from benchmarks.contenders import Work
from benchmarks.sizes import SIZES, Size
from mst_ds.config import GIB

_K = 1024


@dataclass(frozen=True)
class Scale:
    """Models and lengths; lengths are in tokens.

    Args:
        exact, model, wide: models to compare gradients of, to time whole, and with the wide layers of a larger one.
        window: of the sliding-window model that is derived from `exact`.
        chunk_length: of MLPs and losses. 2048 is DeepSpeed ALST's own choice for the 1B model.
        exact_length, exact_documents: the sequence whose gradients are compared, and the documents it is packed of.
        phase_lengths: of `model` and of `wide`, whose memory is measured by phase.
        speed_lengths, long_length: of `model` in rounds, of `wide` in one step.
        rounds: interleaved, of each contender.
        limit: bytes, within which the longest sequences are sought; on a CPU of activations and gradients.
        length_step: to which these are found.
        packed_length, packed_documents: of the packed step.
        product: rows and columns of a weight gradient, of which products are timed; product_tokens: summed over.
        heads, key_heads, head_dims, kernel_length: of the attention whose kernels are timed.
        new_lengths: that no kernel has seen.
        copy_bytes: copied between host and device.
    """

    exact: Size
    model: Size
    wide: Size
    window: int
    chunk_length: int
    exact_length: int
    exact_documents: tuple[int, ...]
    phase_lengths: tuple[int, int]
    speed_lengths: tuple[int, ...]
    long_length: int
    rounds: int
    limit: int
    length_step: int
    packed_length: int
    packed_documents: int
    product: tuple[int, int]
    product_tokens: tuple[int, ...]
    heads: int
    key_heads: int
    head_dims: tuple[int, ...]
    kernel_length: int
    new_lengths: tuple[int, ...]
    copy_bytes: int

    def work(self, seq_len: int) -> Work:
        """In chunks of `chunk_length`."""
        chunks = -(-seq_len // self.chunk_length)
        return Work(seq_len, chunks, chunks)


def _with_layers(size: Size, layers: int) -> Size:
    return replace(size, dimensions={**size.dimensions, "num_hidden_layers": layers})


_SMALL: Mapping[str, int | bool] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 301,
    "tie_word_embeddings": True,
}

GPU = Scale(
    exact=_with_layers(SIZES["llama-3.2-1b"], 4),
    model=SIZES["llama-3.2-1b"],
    wide=SIZES["llama-3.1-8b-layers"],
    window=1000,
    chunk_length=2 * _K,
    exact_length=4 * _K,
    exact_documents=(1700, 1, 130, 1011, 1254),
    phase_lengths=(32 * _K, 128 * _K),
    speed_lengths=(8 * _K, 32 * _K),
    long_length=128 * _K,
    rounds=3,
    limit=16 * GIB,
    length_step=_K,
    packed_length=32 * _K,
    packed_documents=64,
    product=(14336, 4096),
    product_tokens=(256, _K, 4 * _K, 16 * _K),
    heads=32,
    key_heads=8,
    head_dims=(64, 128),
    kernel_length=32 * _K,
    new_lengths=tuple(range(1001, 2601, 200)),
    copy_bytes=GIB,
)

TINY = Scale(
    exact=Size(_SMALL, torch.bfloat16, (128,)),
    model=Size(_SMALL, torch.float32, (128,)),
    wide=Size({**_SMALL, "hidden_size": 128, "tie_word_embeddings": False}, torch.float32, (128,)),
    window=48,
    chunk_length=32,
    exact_length=128,
    exact_documents=(61, 1, 19, 47),
    phase_lengths=(128, 256),
    speed_lengths=(64, 128),
    long_length=256,
    rounds=2,
    limit=2 * 2**20,
    length_step=64,
    packed_length=128,
    packed_documents=8,
    product=(96, 64),
    product_tokens=(32, 64),
    heads=4,
    key_heads=2,
    head_dims=(32, 64),
    kernel_length=128,
    new_lengths=tuple(range(33, 65, 4)),
    copy_bytes=2**20,
)
