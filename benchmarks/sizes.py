"""The models that are measured: shapes of published models, with as many layers as one device holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig


@dataclass(frozen=True)
class Size:
    """A model with random weights.

    Args:
        dimensions: for `LlamaConfig`, in Hugging Face's names.
        dtype: of the weights and of everything else.
        lengths: tokens in a sequence, from short to long, that the table shows.
    """

    dimensions: Mapping[str, int | bool]
    dtype: torch.dtype
    lengths: tuple[int, ...]

    def config(self, **changes: int) -> LlamaConfig:
        """The model's config; `changes` replace dimensions."""
        dimensions: dict[str, Any] = {"max_position_embeddings": max(self.lengths), **self.dimensions, **changes}
        return LlamaConfig(**dimensions | {"use_cache": False, "attn_implementation": "sdpa"})


def _llama3(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool) -> dict[str, int | bool]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": tied,
    }


_K = 1024
_GPU_LENGTHS = tuple(length * _K for length in (2, 4, 8, 16, 32, 64, 128))

SIZES: Mapping[str, Size] = {
    "cpu-small": Size(
        {
            "hidden_size": 512,
            "intermediate_size": 1792,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": 32000,
        },
        torch.float32,
        (512, 2 * _K, 4 * _K, 16 * _K),
    ),
    "llama-3.2-1b": Size(_llama3(2048, 8192, 16, 32, tied=True), torch.bfloat16, _GPU_LENGTHS),
    "llama-3.2-3b": Size(_llama3(3072, 8192, 28, 24, tied=True), torch.bfloat16, _GPU_LENGTHS),
    # 4 of 32 layers: with embedding, head and gradients 7 GiB, so that what is left is for activations.
    "llama-3.1-8b-layers": Size(_llama3(4096, 14336, 4, 32, tied=False), torch.bfloat16, _GPU_LENGTHS),
}
