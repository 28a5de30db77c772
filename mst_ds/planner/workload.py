"""What one rank computes in a micro-batch: the numbers that the memory terms are made of."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from mst_ds.config import SOFTCAP_ATTENTION
from mst_ds.geometry import (
    LEAST_CHUNK_TOKENS,
    HeadLayout,
    block_queries,
    ceil_divide,
    has_flash_attention,
    shard_length,
)
from mst_ds.model_shape import ModelShape
from mst_ds.settings import Settings
from mst_ds.zero import ZeroConfig

_Of = TypeVar("_Of")
_Rest = ParamSpec("_Rest")
_Found = TypeVar("_Found")
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Workload:
    """A model under a ZeRO setting, on one shard of `seq_len` tokens, with the settings of a rank or some to try.

    reserve: bytes of the device that are left to others than tensors. ranks_per_node: neighbours in rank order.
    capability: of CUDA, the device's; None: not known. sequences_per_sample: `seq_len` is of so many sequences, none of
    which attends to another.
    """

    shape: ModelShape
    zero: ZeroConfig
    seq_len: int
    settings: Settings
    reserve: int = 0
    ranks_per_node: int = 1
    capability: tuple[int, int] | None = None
    sequences_per_sample: int = 1

    def with_settings(self, **changes: Any) -> Workload:
        """This with other values of some knobs: of the same values it is the same object, with what is `remembered`."""
        settings = replace(self.settings, **changes)
        if settings not in self._of_settings:
            other = replace(self, settings=settings)
            vars(other).update(_of_settings=self._of_settings, _computing=self._computing)
            self._of_settings[settings] = other
        return self._of_settings[settings]

    def with_zero(self, zero: ZeroConfig) -> Workload:
        """This under another ZeRO setting; what is `remembered_computing` is so for both, where both compute alike."""
        other = replace(self, zero=zero)
        if (zero.dtype, zero.micro_batch_size) == (self.zero.dtype, self.zero.micro_batch_size):
            vars(other)["_computing"] = self._computing
        return other

    @property
    def computing(self) -> Workload:
        """One with the same activations: of several that differ in nothing but ZeRO's settings always the same."""
        return self._computing.setdefault(self.settings, self)

    @cached_property
    def _computing(self) -> dict[Settings, Workload]:
        return {}

    @cached_property
    def _of_settings(self) -> dict[Settings, Workload]:
        """What differs from this in nothing but its settings, as far as it has been made."""
        return {self.settings: self}

    @cached_property
    def without_idle_windows(self) -> Workload:
        """This, of whole sequences, without windows that hide no token."""
        shape = self.shape.within(self.attention_length)
        return self if shape is self.shape else replace(self, shape=shape)

    @cached_property
    def kinds(self) -> tuple[Workload, ...]:
        """This with the layers of one shape alone, for each shape; itself where all layers are alike."""
        shapes = self.shape.kinds
        return (self,) if len(shapes) == 1 else tuple(replace(self, shape=shape) for shape in shapes)

    @property
    def sp_size(self) -> int:
        return self.settings.sp_size

    @cached_property
    def tokens(self) -> int:
        """B * L: chunks are taken over the flattened tokens of the micro-batch's shard."""
        return self.zero.micro_batch_size * shard_length(self.seq_len, self.sp_size)

    @cached_property
    def layer_chunks(self) -> int:
        """In how many chunks a layer is worked through; fewer than the setting where they would be too short."""
        if not self.settings.recompute:
            return 1
        length = shard_length(self.seq_len, self.sp_size)
        return min(self.settings.layer_chunks, max(1, length // LEAST_CHUNK_TOKENS))

    @cached_property
    def of_chunk(self) -> Workload:
        """What a layer computes at a time: its longest chunk, which is one stretch of the whole sequence."""
        length = ceil_divide(shard_length(self.seq_len, self.sp_size), self.layer_chunks)
        return replace(self, seq_len=self.sp_size * length).with_settings(layer_chunks=1)

    @cached_property
    def earlier_tokens(self) -> int:
        """B * S of all chunks of a layer but the last, whose keys and values no other chunk reads."""
        length = shard_length(self.seq_len, self.sp_size)
        return self.zero.micro_batch_size * self.sp_size * (length - length // self.layer_chunks)

    @property
    def attention_tokens(self) -> int:
        """B * S, with S padded to a multiple of sp_size: between the all-to-alls a rank sees all tokens."""
        return self.tokens * self.sp_size

    @cached_property
    def heads(self) -> HeadLayout:
        """Which heads a rank works on between the all-to-alls; without sequence parallelism there is one group."""
        groups = self.settings.head_groups if self.sp_size > 1 else 1
        return HeadLayout(self.shape.num_attention_heads, self.shape.num_key_value_heads, self.sp_size, groups)

    @property
    def query_heads(self) -> int:
        """Query heads of a rank between the all-to-alls."""
        return self.heads.most_query_heads

    @cached_property
    def key_value_width(self) -> int:
        """Of a rank's keys and values between the all-to-alls, those of all groups together."""
        return self.heads.most_key_value_heads * (self.shape.head_dim + self.shape.value_head_dim)

    @property
    def group_query_heads(self) -> int:
        """Query heads of a rank that attention works on at a time."""
        return self.heads.most_query_heads_of_group

    @property
    def group_key_value_heads(self) -> int:
        """Key/value heads that they read, or the copies of these where the heads have no even grouping."""
        return self.heads.most_key_value_heads_of_group

    @property
    def repeats_key_value(self) -> bool:
        """Whether the kernel wants as many key/value heads as query heads, as torch's does where it has no flash."""
        return not self.has_flash and self.group_key_value_heads != self.group_query_heads

    @property
    def has_flash(self) -> bool:
        """Whether flash attention has a kernel for the model's dtype and heads on the device."""
        return has_flash_attention(self.zero.dtype_bytes, self.kernel_head_dim, self.capability)

    @property
    def kernel_head_dim(self) -> int:
        """The width of all heads that a kernel is given: what is narrower is widened."""
        return max(self.shape.head_dim, self.shape.value_head_dim)

    @property
    def is_blockwise(self) -> bool:
        """Whether no kernel computes attention: a softcap is known to some packages alone, which have no fp32."""
        return self.shape.has_attention_softcap and (
            self.settings.attention not in SOFTCAP_ATTENTION or not self.has_flash
        )

    @property
    def attention_keeping_layers(self) -> int:
        """Layers whose attention's output is kept: a window makes attention too cheap for it."""
        keeps = self.settings.recompute and self.settings.keep_attention
        return self.shape.full_attention_layers if keeps else 0

    @property
    def last_layer_has_window(self) -> bool:
        return self.shape.num_hidden_layers - 1 in self.shape.window_layers

    @property
    def last_layer_has_attention(self) -> bool:
        return self.shape.layers[-1].has_attention

    @property
    def last_layer_keeps_attention(self) -> bool:
        return self.attention_keeping_layers > 0 and not self.last_layer_has_window

    @property
    def attention_length(self) -> int:
        """S, padded to a multiple of sp_size."""
        return self.sp_size * shard_length(self.seq_len, self.sp_size)

    @property
    def without_effect(self) -> Mapping[str, bool | int]:
        """Knobs that this model has nothing for, and what they are then: experts cannot keep gate and up, nor can an
        MLP with adapters inside; attention of another kind is not kept; its layers are one chunk, and those with an
        indexer."""
        experts, trained = self.shape.experts, self.shape.trained.mlp
        has_mlps = self.shape.num_dense_layers or (experts is not None and experts.shared_intermediate_size)
        is_plain = any(layer.has_plain_mlp for layer in self.shape.layers)
        can_keep_mlp = has_mlps and is_plain and (trained is None or trained == 0)
        off: dict[str, bool | int] = {} if can_keep_mlp else {"keep_mlp": False}
        if self.shape.has_own_attention:
            return off | {"keep_attention": False, "layer_chunks": 1}
        return off if self.shape.indexer is None else off | {"layer_chunks": 1}

    @property
    def picked_keys(self) -> int:
        """Those of each query that an indexer picks; 0 where a query sees all."""
        return 0 if self.shape.indexer is None else min(self.shape.indexer.top_k, self.attention_length)

    @property
    def block_scores(self) -> int:
        """Scores of one head that attention without a kernel computes at a time, on an accelerator."""
        heads = self.zero.micro_batch_size * self.group_query_heads
        return self.attention_length * block_queries(self.attention_length, heads)

    def chunk_tokens(self, chunks: int) -> int:
        return ceil_divide(self.tokens, chunks)

    def sharded(self, elements: int, from_stage: int) -> int:
        """The elements that a rank holds of something that ZeRO shards from `from_stage` on."""
        return ceil_divide(elements, self.zero.dp_world_size) if self.zero.stage >= from_stage else elements


def of_all_kinds(
    function: Callable[Concatenate[Workload, _Rest], _Number],
) -> Callable[Concatenate[Workload, _Rest], _Number]:
    """`function`, which is of layers that are alike, added up over the kinds of a model's layers."""

    @wraps(function)
    def found(work: Workload, /, *arguments: _Rest.args, **keywords: _Rest.kwargs) -> _Number:
        return functools.reduce(operator.add, (function(kind, *arguments, **keywords) for kind in work.kinds))

    return found


def remembered(
    function: Callable[Concatenate[_Of, _Rest], _Found],
) -> Callable[Concatenate[_Of, _Rest], _Found]:
    """`function`, which is called again with the very same workload, or request, in a search, and then has its result
    at hand.

    Results lie with the first argument, which is frozen, and go with it.
    """
    name = f"_{function.__module__}.{function.__qualname__}"

    @wraps(function)
    def found(of: _Of, /, *arguments: _Rest.args, **keywords: _Rest.kwargs) -> _Found:
        results = vars(of).setdefault(name, {})
        key = (arguments, *keywords.items())
        if key not in results:
            results[key] = function(of, *arguments, **keywords)
        return results[key]

    return found


def remembered_computing(
    function: Callable[Concatenate[Workload, _Rest], _Found],
) -> Callable[Concatenate[Workload, _Rest], _Found]:
    """`remembered`, of what does not depend on where ZeRO has the states: activations."""
    of_computing = remembered(function)

    @wraps(function)
    def found(work: Workload, /, *arguments: _Rest.args, **keywords: _Rest.kwargs) -> _Found:
        return of_computing(work.computing, *arguments, **keywords)

    return found
