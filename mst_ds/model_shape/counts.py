"""Counts the parameters of a decoder from its dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mst_ds.model_shape.beside_layers import beside_experts, beside_layers, beside_residual
from mst_ds.model_shape.experts import ExpertShape
from mst_ds.model_shape.families import Family, Switch, is_on
from mst_ds.model_shape.layers import LayerShape, layer_configs
from mst_ds.model_shape.state_space import read_state_space

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Dimensions:
    """What counts are made of. head_dim is that of queries and keys, value_head_dim that of values.

    layers: of each its own; where they differ, the other sizes are the largest of each.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    value_head_dim: int
    vocab_size: int
    layers: tuple[LayerShape, ...]


@dataclass(frozen=True)
class ParameterCounts:
    """tables: of the embeddings of each layer. layer: of the largest one. active: of all, what one token meets: not the
    experts that it is not routed to."""

    embedding: int
    positions: int
    tables: int
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
    of_layers = layer_configs(config, dimensions.num_hidden_layers)
    counters = [
        _LayerCounter(of_layer, family, hidden, layer)
        for of_layer, layer in zip(of_layers, dimensions.layers, strict=True)
    ]
    state_space = read_state_space(config)
    sparse_layers, experts_of_layer, active = 0, 0, 0
    if experts is not None:
        sparse_layers = experts.num_sparse_layers
        experts_of_layer = counters[0].experts(experts, experts.num_experts)
        active = counters[0].experts(experts, experts.num_experts_per_tok)
    # Which layers are sparse decides nothing but where their dense MLPs are not alike: the last ones.
    mlps = [counter.dense_mlp() for counter in counters[: dimensions.num_hidden_layers - sparse_layers]]
    mlps += [experts_of_layer] * sparse_layers
    attentions = [counter.beside_mlp() for counter in counters]
    if state_space is not None:
        mlps, attentions = [0] * len(counters), [state_space.parameter_count] * len(counters)
    embedding = vocab * hidden
    positions = config.max_position_embeddings * hidden if family.learned_positions else 0
    head = (not is_on("tie_word_embeddings", config)) * embedding + is_on(family.head_bias, config) * vocab
    layers = sum(attentions) + sum(mlps)
    tables, projections = beside_layers(config, hidden)
    total = embedding + positions + tables + projections + head + counters[0].norm() + layers
    return ParameterCounts(
        embedding=embedding,
        positions=positions,
        tables=tables,
        head=head,
        layer=max(map(sum, zip(attentions, mlps, strict=True))),
        all=total,
        active=total - sparse_layers * (experts_of_layer - active),
    )


class _LayerCounter:
    def __init__(self, config: PreTrainedConfig, family: Family, hidden: int, layer: LayerShape) -> None:
        self._config, self._family, self._hidden, self._layer = config, family, hidden, layer

    def norm(self) -> int:
        """One norm over the hidden size."""
        return self._hidden * self._weights_of_norm

    def dense_mlp(self) -> int:
        return self._mlp(self._layer.intermediate_size)

    def experts(self, experts: ExpertShape, num_experts: int) -> int:
        """`num_experts` of a layer's experts, with what chooses them and what stands beside them."""
        family = self._family
        router = experts.num_experts * (self._hidden + family.router_bias)
        router += beside_experts(self._config, self._hidden, experts.num_experts)
        shared = 0
        if experts.shared_intermediate_size:
            shared = self._mlp(experts.shared_intermediate_size) + family.shared_gate * self._hidden
        return router + shared + num_experts * self._mlp(experts.intermediate_size)

    def beside_mlp(self) -> int:
        family = self._family
        norms = (family.pre_norms + family.post_norms) * self.norm()
        sinks = family.sinks * self._layer.num_attention_heads
        return self._attention() + norms + sinks + beside_residual(self._config, self._hidden)

    def _mlp(self, intermediate: int) -> int:
        into = (2 if self._family.gated_mlp else 1) * intermediate
        biases = self._is_on(self._family.mlp_bias) * (into + self._hidden)
        return self._hidden * (into + intermediate) + biases

    def _attention(self) -> int:
        layer, family, hidden = self._layer, self._family, self._hidden
        output = layer.num_attention_heads * layer.value_head_dim
        output_projection = hidden * (output + self._is_on(family.output_bias))
        if getattr(self._config, "kv_lora_rank", None) is not None:
            return self._latent_query_key_value() + output_projection
        query, key = layer.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
        value = layer.num_key_value_heads * layer.value_head_dim * layer.has_value_projection
        of_queries = {"none": 0, "head": layer.head_dim, "all_heads": query}[family.qk_norm]
        of_keys = {"none": 0, "head": layer.head_dim, "all_heads": key}[family.qk_norm]
        if not layer.has_own_keys:
            key = value = of_keys = 0
        return (
            (query + key + value) * (hidden + self._is_on(family.qkv_bias))
            + (of_queries + of_keys) * self._weights_of_norm * self._is_on(family.has_qk_norm)
            + output_projection
        )

    def _latent_query_key_value(self) -> int:
        """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): low-rank projections with a norm
        between them, and a rotary key that all heads share."""
        config, layer, hidden = self._config, self._layer, self._hidden
        inputs = hidden + self._is_on(self._family.qkv_bias)
        query = layer.num_attention_heads * layer.head_dim
        rank = getattr(config, "q_lora_rank", None)
        queries = hidden * query if rank is None else rank * (inputs + 1 + query)
        rank, rotary = config.kv_lora_rank, config.qk_rope_head_dim
        keys_and_values = layer.num_attention_heads * (layer.head_dim - rotary + layer.value_head_dim)
        return queries + (rank + rotary) * inputs + rank * (1 + keys_and_values)

    @property
    def _weights_of_norm(self) -> int:
        """Parameters for each element that a norm works on: a LayerNorm has a bias."""
        return 2 if self._family.norm == "layer" else 1

    def _is_on(self, switch: Switch) -> bool:
        return is_on(switch, self._config)
