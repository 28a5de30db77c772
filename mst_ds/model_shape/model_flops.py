"""Model FLOPs: what a forward and backward cost without computing anything a second time."""

from __future__ import annotations

from mst_ds.model_shape.shape import ModelShape


def flops_per_token(shape: ModelShape, seq_len: int) -> float:
    """Model FLOPs of the forward and backward for one token of a sequence of `seq_len`, without recompute.

    6 · parameters + 12 · layers · heads · head_dim · tokens attended to, after PaLM (arXiv 2204.02311, appendix B).
    Parameters are those that the token meets: of a mixture of experts its own. An input embedding is looked up, not
    multiplied, and so not counted, unless it is tied: then it is the head. Under a causal mask a token attends to half
    of the sequence on average, in a layer with a sliding window to its window at most.
    """
    multiplied = shape.active_parameter_count - shape.position_parameter_count
    if not shape.tie_word_embeddings:
        multiplied -= shape.embedding_parameter_count
    multiplied -= shape.table_parameter_count
    products = 0
    for kind in shape.kinds:
        pairs = kind.full_attention_layers * attended_pairs(seq_len, seq_len)
        pairs += sum(attended_pairs(window, seq_len) for window in kind.sliding_windows)
        products += pairs * kind.num_attention_heads * (kind.head_dim + kind.value_head_dim)
    return 6.0 * multiplied + 6.0 * products / seq_len


def attended_pairs(window: int, seq_len: int) -> int:
    """Pairs of a query and a key in a causal sequence where a token sees the last `window` tokens: all but the first
    queries see the whole window."""
    window = min(window, seq_len)
    return seq_len * window - window * window // 2
