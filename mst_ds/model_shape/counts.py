"""Counts the parameters of a decoder from its dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mst_ds.model_shape.experts import ExpertShape
from mst_ds.model_shape.families import Family, Switch, is_on
from mst_ds.model_shape.state_space import read_state_space

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Dimensions:
    """What counts are made of. head_dim is that of queries and keys, value_head_dim that of values."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    value_head_dim: int
    vocab_size: int


@dataclass(frozen=True)
class ParameterCounts:
    """layer: of the largest one. active: of all, what one token meets: not the experts that it is not routed to."""

    embedding: int
    positions: int
    head: int
    layer: int
    all: int
    active: int


@dataclass(frozen=True)
class TrainedCounts:
    """Of the parameters those that are trained, adapters among them.

    layer: of the largest layer. mlp: of its MLP, None where that is trained whole. head: of the head's weight.
    embedding: of what has its gradient after all layers have theirs: not where the head's weight is the embedding's.
    largest: of one weight. dropout_width: elements of a token that go through the dropout of adapters beside the MLP,
    in a layer.
    """

    all: int
    layer: int
    mlp: int | None
    head: int
    embedding: int
    largest: int
    dropout_width: int = 0


def count_parameters(
    config: PreTrainedConfig, family: Family, dimensions: Dimensions, experts: ExpertShape | None
) -> ParameterCounts:
    """Counts by family; the config says which biases and norms it has, and whether the head is the embedding."""
    hidden, vocab = dimensions.hidden_size, dimensions.vocab_size
    counter = _LayerCounter(config, family, dimensions)
    state_space = read_state_space(config)
    dense = counter.dense_layer() if state_space is None else state_space.parameter_count
    sparse = active = 0
    dense_layers, sparse_layers = dimensions.num_hidden_layers, 0
    if experts is not None:
        sparse_layers = experts.num_sparse_layers
        dense_layers -= sparse_layers
        sparse = counter.sparse_layer(experts, experts.num_experts)
        active = counter.sparse_layer(experts, experts.num_experts_per_tok)
    embedding = vocab * hidden
    positions = config.max_position_embeddings * hidden if family.learned_positions else 0
    head = (not is_on("tie_word_embeddings", config)) * embedding + is_on(family.head_bias, config) * vocab
    total = embedding + positions + head + counter.norm() + dense_layers * dense + sparse_layers * sparse
    return ParameterCounts(
        embedding=embedding,
        positions=positions,
        head=head,
        layer=max(sparse, dense if dense_layers else 0),
        all=total,
        active=total - sparse_layers * (sparse - active),
    )


class _LayerCounter:
    def __init__(self, config: PreTrainedConfig, family: Family, dimensions: Dimensions) -> None:
        self._config, self._family, self._dimensions = config, family, dimensions
        self._hidden = dimensions.hidden_size

    def norm(self) -> int:
        """One norm over the hidden size."""
        return self._hidden * self._weights_of_norm

    def dense_layer(self) -> int:
        return self._beside_mlp() + self._mlp(self._dimensions.intermediate_size)

    def sparse_layer(self, experts: ExpertShape, num_experts: int) -> int:
        """A layer with `num_experts` of its experts."""
        family = self._family
        router = experts.num_experts * (self._hidden + family.router_bias)
        shared = 0
        if experts.shared_intermediate_size:
            shared = self._mlp(experts.shared_intermediate_size) + family.shared_gate * self._hidden
        return self._beside_mlp() + router + shared + num_experts * self._mlp(experts.intermediate_size)

    def _beside_mlp(self) -> int:
        family = self._family
        norms = (family.pre_norms + family.post_norms) * self.norm()
        return self._attention() + norms + family.sinks * self._dimensions.num_attention_heads

    def _mlp(self, intermediate: int) -> int:
        into = (2 if self._family.gated_mlp else 1) * intermediate
        biases = self._is_on(self._family.mlp_bias) * (into + self._hidden)
        return self._hidden * (into + intermediate) + biases

    def _attention(self) -> int:
        sizes, family, hidden = self._dimensions, self._family, self._hidden
        output = sizes.num_attention_heads * sizes.value_head_dim
        output_projection = hidden * (output + self._is_on(family.output_bias))
        if getattr(self._config, "kv_lora_rank", None) is not None:
            return self._latent_query_key_value() + output_projection
        query, key = sizes.num_attention_heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
        value = sizes.num_key_value_heads * sizes.value_head_dim
        qk_norms = {"none": 0, "head": 2 * sizes.head_dim, "all_heads": query + key}[family.qk_norm]
        return (
            (query + key + value) * (hidden + self._is_on(family.qkv_bias))
            + qk_norms * self._weights_of_norm * self._is_on(family.has_qk_norm)
            + output_projection
        )

    def _latent_query_key_value(self) -> int:
        """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): low-rank projections with a norm
        between them, and a rotary key that all heads share."""
        config, sizes, hidden = self._config, self._dimensions, self._hidden
        inputs = hidden + self._is_on(self._family.qkv_bias)
        query = sizes.num_attention_heads * sizes.head_dim
        rank = getattr(config, "q_lora_rank", None)
        queries = hidden * query if rank is None else rank * (inputs + 1 + query)
        rank, rotary = config.kv_lora_rank, config.qk_rope_head_dim
        keys_and_values = sizes.num_attention_heads * (sizes.head_dim - rotary + sizes.value_head_dim)
        return queries + (rank + rotary) * inputs + rank * (1 + keys_and_values)

    @property
    def _weights_of_norm(self) -> int:
        """Parameters for each element that a norm works on: a LayerNorm has a bias."""
        return 2 if self._family.norm == "layer" else 1

    def _is_on(self, switch: Switch) -> bool:
        return is_on(switch, self._config)
