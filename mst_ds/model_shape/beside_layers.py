"""What a decoder has beside attention and MLPs: embeddings of each layer, residual streams, low-rank residuals.

Per-layer embeddings, AltUp (arXiv 2301.13310) and LAuReL (arXiv 2411.07501) as Gemma 3n and 4 have them.
"""

from __future__ import annotations

from typing import Any

from mst_ds.model_shape.sizes import optional_size


def beside_layers(config: Any, hidden: int) -> tuple[int, int]:
    """Parameters of no layer: of tables that are looked up, and of projections."""
    width, streams = optional_size(config, "hidden_size_per_layer_input") or 0, residual_streams(config)
    all_layers = width * config.num_hidden_layers
    table = all_layers * (optional_size(config, "vocab_size_per_layer_input") or 0)
    into_streams = 2 * (streams - 1) * hidden * hidden
    return table, hidden * all_layers + width + into_streams


def beside_residual(config: Any, hidden: int) -> int:
    """Parameters of a layer: what adds its embedding, what goes beside attention, and what mixes its streams."""
    width, rank = (optional_size(config, name) or 0 for name in ("hidden_size_per_layer_input", "laurel_rank"))
    streams = residual_streams(config)
    embedding = width and 2 * hidden * width + hidden
    low_rank = rank and 2 * hidden * rank + hidden
    # Coefficients of prediction and correction, what chooses them of a norm, and a scale.
    mixing = streams**3 + streams**2 + hidden * streams + 2 * hidden if streams > 1 else 0
    return embedding + low_rank + mixing


def products_beside_residual(config: Any, hidden: int) -> int:
    """Multiplications of a token in a layer with these parameters, and of its streams with each other."""
    streams = residual_streams(config)
    return beside_residual(config, hidden) + (hidden * streams**2 if streams > 1 else 0)


def beside_experts(config: Any, hidden: int, num_experts: int) -> int:
    """Parameters of a layer that has experts beside its MLP (Gemma 4): scales of its router, and a norm before and
    after each of both, of which one is there without experts, too."""
    return 4 * hidden + num_experts if getattr(config, "enable_moe_block", False) else 0


def residual_streams(config: Any) -> int:
    """Hidden states of a token that go from layer to layer: 1 but for AltUp."""
    return optional_size(config, "altup_num_inputs") or 1
