"""Memory terms of attention: the local tensors of this shard, and the gathered ones of one group of heads."""

from __future__ import annotations

from mst_ds.geometry import flash_query_gradient
from mst_ds.model_shape import ModelShape
from mst_ds.planner.picks import masked_step
from mst_ds.planner.types import MemoryTerm, product_term, total_bytes
from mst_ds.planner.windows import has_blocks, window_gradients
from mst_ds.planner.workload import Workload

Terms = tuple[MemoryTerm, ...]

_FP32_BYTES = 4


def local_term(work: Workload, name: str, width: int, layers: int = 1) -> MemoryTerm:
    """A tensor of this shard's tokens, in the model's dtype, of each of so many layers."""
    factors = (("tokens", work.tokens), ("width of all heads", width), ("bytes", work.zero.dtype_bytes))
    return product_term(name, "device", ("layers", layers), *factors)


def query_key_value_width(shape: ModelShape) -> int:
    """Of all heads."""
    return shape.num_attention_heads * shape.head_dim + key_value_width(shape)


def projected_width(shape: ModelShape) -> int:
    """Of all heads, what a layer projects its input to: keys and values where it has its own."""
    layer, keys = shape.layers[-1], shape.num_key_value_heads * shape.head_dim
    values = shape.num_key_value_heads * shape.value_head_dim * layer.has_value_projection
    return shape.num_attention_heads * shape.head_dim + (keys + values) * layer.has_own_keys


def saved_width(shape: ModelShape) -> int:
    """Of all heads, what a layer saves: keys and values of another layer are that one's."""
    queries = shape.num_attention_heads * shape.head_dim
    return queries + key_value_width(shape) * shape.layers[-1].has_own_keys


def key_value_width(shape: ModelShape) -> int:
    """Of all heads."""
    return shape.num_key_value_heads * (shape.head_dim + shape.value_head_dim)


def output_width(shape: ModelShape) -> int:
    """Of all heads."""
    return shape.num_attention_heads * shape.value_head_dim


def local_gradients(work: Workload) -> Terms:
    """Of queries, keys, values and the output; of keys and values in fp32 where several ranks or groups have one."""
    terms = (local_term(work, "attention_gradients", query_key_value_width(work.shape) + output_width(work.shape)),)
    if not work.heads.shares_key_values or work.zero.dtype_bytes >= _FP32_BYTES:
        return terms
    more = (
        ("tokens", work.tokens),
        ("width of keys and values", key_value_width(work.shape)),
        ("bytes more", _FP32_BYTES - work.zero.dtype_bytes),
    )
    return (*terms, product_term("shared_gradient_sums", "device", *more))


def log_sum_exp(work: Workload, layers: int) -> MemoryTerm:
    """What a kernel keeps for its backward beside what it is given and returns."""
    return product_term(
        "log_sum_exp",
        "device",
        ("layers", layers),
        ("tokens of all shards", work.attention_tokens),
        ("query heads of this rank", work.query_heads),
        ("bytes", _FP32_BYTES),
    )


def holds_keys_values(work: Workload) -> bool:
    """Whether exchanged keys and values are there from when attention is computed again until its backward."""
    is_exchanged = work.sp_size > 1 and work.last_layer_has_attention
    return work.settings.recompute and is_exchanged and not work.last_layer_keeps_attention


def held_keys_values(work: Workload) -> Terms:
    """Those of all groups of heads, of a layer or of its last chunk; those of earlier chunks are carried."""
    if not holds_keys_values(work):
        return ()
    width = ("width of keys and values", work.key_value_width), ("bytes", work.zero.dtype_bytes)
    return (product_term("held_keys_values", "device", ("tokens of all shards", work.attention_tokens), *width),)


def gathered_step(work: Workload, *, backward: bool) -> Terms:
    """What attention needs for one group of heads, beside the local tensors that it reads and writes.

    Without sequence parallelism it works on the local tensors themselves. With it, three moments can be the highest:
    the exchange before the kernel, the kernel, and the exchange after it. An exchange has a flat buffer at either end.
    """
    kernel = (
        *_attention_scores(work, backward=backward),
        *_repeated_key_value(work, backward=backward),
        *_widened_heads(work, backward=backward),
        *masked_step(work, backward=backward),
    )
    if backward:
        kernel += _kernel_workspace(work)
    # Flash attention makes the output itself; of other kernels it is put together, document by document.
    has_parts = not backward and (not work.has_flash or work.shape.indexer is not None)
    made = (_gathered(work, "kernel_output", 1, _group_output(work)),) if has_parts else ()
    if work.sp_size == 1:
        return (*kernel, *made)
    inputs = _gathered_inputs(work, backward=backward)
    if not backward:
        return max(
            (inputs, _gathered(work, "all_to_all_buffers", 1, _group_inputs(work))),
            (inputs, _gathered(work, "gathered_output", 1, _group_output(work)), *kernel, *made),
            (
                _gathered(work, "gathered_output", 1, _group_output(work)),
                _gathered(work, "all_to_all_buffers", 2, _group_output(work)),
            ),
            key=total_bytes,
        )
    outputs = _gathered(work, "gathered_output_and_gradient", 2, _group_output(work))
    gradients = _gathered(work, "gathered_gradients", 1, _group_inputs(work))
    return max(
        (inputs, outputs, _gathered(work, "all_to_all_buffers", 2, _group_output(work))),
        (inputs, outputs, gradients, *kernel),
        (gradients, _gathered(work, "all_to_all_buffers", 2, _group_inputs(work))),
        key=total_bytes,
    )


def earlier_keys_step(work: Workload, *, backward: bool) -> Terms:
    """What attention of a chunk to earlier chunks' keys needs for one group of heads, beside the local tensors: it is
    merged in fp32, and a group's query heads are rows of one head, which is a copy where heads were not gathered."""
    width = work.group_query_heads * work.shape.head_dim
    kernel, is_local = _attention_scores(work, backward=backward), work.sp_size == 1
    merged = _FP32_BYTES // work.zero.dtype_bytes
    own: list[MemoryTerm] = []
    if backward:
        # Of a group's heads nothing is repeated. The queries' gradient is merged; without sequence parallelism the
        # chunk's gradients count as local ones.
        made = [_gathered(work, "block_gradients", 1, width + _group_keys(work)), *_kernel_workspace(work)[:1]]
        if is_local:
            merged -= 1
        else:
            own = [_gathered(work, "gathered_gradients", 1, _group_keys(work))]
    else:
        # What is merged, before the output is; where there is one group that counts as the local output.
        made = [_gathered(work, "block_output", 1, _group_output(work))] * (len(work.heads.groups) > 1)
    if merged:
        made.append(_gathered(work, "merged_in_fp32", merged, width if backward else _group_output(work)))
    if is_local:
        return (*own, *made, *kernel, _gathered(work, "folded_heads", 3 if backward else 1, width))
    outputs = [_gathered(work, "gathered_output_and_gradient", 2, _group_output(work))] * backward
    return (_gathered_inputs(work, backward=backward), *outputs, *own, *made, *kernel)


def _gathered_inputs(work: Workload, *, backward: bool) -> MemoryTerm:
    if backward and holds_keys_values(work):
        return _gathered(work, "gathered_query", 1, work.group_query_heads * work.shape.head_dim)
    return _gathered(work, "gathered_query_key_value", 1, _group_inputs(work))


def window_step(work: Workload) -> Terms:
    """In the backward of a last layer with a window: the gradients of one group's blocks, beside what is gathered."""
    if not _last_layer_has_blocks(work):
        return ()
    if work.sp_size == 1:
        return window_gradients(work)
    return (
        _gathered(work, "gathered_query_key_value", 1, _group_inputs(work)),
        _gathered(work, "gathered_output_and_gradient", 2, _group_output(work)),
        _gathered(work, "gathered_gradients", 1, _group_inputs(work)),
        *window_gradients(work),
    )


def _group_inputs(work: Workload) -> int:
    """The width of one group's queries, keys and values."""
    return work.group_query_heads * work.shape.head_dim + _group_keys(work)


def _group_keys(work: Workload) -> int:
    """The width of one group's keys and values."""
    return work.group_key_value_heads * (work.shape.head_dim + work.shape.value_head_dim)


def _group_output(work: Workload) -> int:
    return work.group_query_heads * work.shape.value_head_dim


def _gathered(work: Workload, name: str, tensors: int, width: int) -> MemoryTerm:
    return product_term(
        name,
        "device",
        ("tensors", tensors),
        ("tokens of all shards", work.attention_tokens),
        ("width of a group's heads", width),
        ("bytes", work.zero.dtype_bytes),
    )


def _repeated_key_value(work: Workload, *, backward: bool) -> Terms:
    """Keys and values with a copy for each query head; in the backward their gradients, too."""
    if not work.repeats_key_value or _last_layer_has_blocks(work):
        return ()  # blocks group heads themselves; of a window's first tokens the copies are small
    width = work.group_query_heads * work.kernel_head_dim
    return (_gathered(work, "repeated_key_value", 4 if backward else 2, width),)


def _widened_heads(work: Workload, *, backward: bool) -> Terms:
    """Kernels want heads of one width: what is narrower is copied, and its gradient is as wide as the copy."""
    keys, values = work.shape.head_dim, work.shape.value_head_dim
    if keys == values:
        return ()
    heads, kv_heads, wide = work.group_query_heads, work.group_key_value_heads, max(keys, values)
    # Output, its gradient and values are as wide as values, query and key as keys.
    if values < keys:
        width = (kv_heads + heads * (2 if backward else 1)) * wide
        width += kv_heads * (wide - values) if backward else 0
    else:
        width = (heads + kv_heads) * (2 * wide - keys if backward else wide)
    return (_gathered(work, "widened_heads", 1, width),)


def _kernel_workspace(work: Workload) -> Terms:
    """What the backward of flash attention allocates for itself, with torch's allocator: the gradient of the queries in
    fp32, and where heads are grouped a gradient of keys and values for each query head (`mha_bwd` in flash_api.cpp).

    cuDNN, which torch prefers on some devices, does not say what it needs, and is planned as if it needed as much. In
    fp32, for wide heads or with a softcap other kernels run.
    """
    if not work.has_flash or work.is_blockwise or work.picked_keys:
        return ()
    heads = ("query heads of a group", work.group_query_heads)
    of_sequence = flash_query_gradient(work.attention_length, work.kernel_head_dim)
    terms = [
        product_term(
            "kernel_query_gradient",
            "device",
            ("sequences", work.zero.micro_batch_size),
            heads,
            *zip(("tokens, rounded up", "head_dim, rounded up"), of_sequence, strict=True),
            ("bytes", _FP32_BYTES),
            kind="workspace",
        )
    ]
    if work.group_key_value_heads != work.group_query_heads:
        terms.append(
            product_term(
                "kernel_key_value_gradients",
                "device",
                ("tensors", 2),
                ("tokens of all shards", work.attention_tokens),
                heads,
                ("head_dim", work.kernel_head_dim),
                ("bytes", work.zero.dtype_bytes),
                kind="workspace",
            )
        )
    return tuple(terms)


def _last_layer_has_blocks(work: Workload) -> bool:
    return has_blocks(work) and work.last_layer_has_window


def _attention_scores(work: Workload, *, backward: bool) -> Terms:
    """No kernel of torch has a softcap: attention is computed in plain torch, by blocks of queries."""
    if not work.is_blockwise:
        return ()
    sums: Terms = ()
    if backward and work.zero.dtype_bytes < _FP32_BYTES:
        # In fp32, over blocks: by so much longer than the gradients themselves.
        width = work.group_key_value_heads * (work.shape.head_dim + work.shape.value_head_dim)
        factors = (("tokens of all shards", work.attention_tokens), ("width of keys and values", width))
        more = ("bytes more", _FP32_BYTES - work.zero.dtype_bytes)
        sums = (product_term("key_value_gradient_sums", "device", *factors, more),)
    return (
        *sums,
        product_term(
            "attention_scores",
            "device",
            ("sequences", work.zero.micro_batch_size),
            ("query heads of a group", work.group_query_heads),
            ("scores of a block", work.block_scores),
            ("bytes with those in 16 bits", _score_bytes(work, backward=backward)),
        ),
    )


def _score_bytes(work: Workload, *, backward: bool) -> int:
    """In the forward weights, and what their log-sum-exp takes. In the backward weights, their gradient and a softcap's
    slope, and a tensor for matrix products if the model has 16 bits."""
    if not backward:
        return 2 * _FP32_BYTES
    return 3 * _FP32_BYTES + (work.zero.dtype_bytes if work.zero.dtype_bytes < _FP32_BYTES else 0)
