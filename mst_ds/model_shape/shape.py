"""Dimensions and parameter counts of a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mst_ds.model_shape.beside_layers import beside_layers, products_beside_residual, residual_streams
from mst_ds.model_shape.config_checks import check_is_decoder, check_numbers, check_parameter_count
from mst_ds.model_shape.counts import Dimensions, ParameterCounts, TrainedCounts, count_parameters
from mst_ds.model_shape.experts import ExpertShape, read_experts
from mst_ds.model_shape.families import FAMILIES, LLAMA, Family, NormKind, is_on
from mst_ds.model_shape.indexer import INDEXED_ATTENTION, IndexerShape, read_indexer
from mst_ds.model_shape.layer_kinds import layer_kinds, mixer_heads, other_layers
from mst_ds.model_shape.layers import LayerShape, handed_on_width, read_layers
from mst_ds.model_shape.positions import fixed_positions, rope_type, rotary_positions
from mst_ds.model_shape.sizes import optional_size, size
from mst_ds.model_shape.state_space import StateSpace, read_state_space

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LARGEST_OF_LAYERS = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "value_head_dim",
    "intermediate_size",
)
_ACTIVATION_NAMES = ("hidden_activation", "hidden_act", "activation_function", "activation")


@dataclass(frozen=True)
class NormShape:
    """The norms of a decoder layer.

    Attributes:
        pre_norms: over the hidden size, with an output that a projection reads.
        post_norms: over the hidden size, with an output that is added to the residual.
        query_key_width: elements of a token's queries and keys that norms work on, 0 without such norms.
        value_width: of its values, where a norm without weights works on them.
    """

    kind: NormKind
    pre_norms: int
    post_norms: int
    query_key_width: int
    value_width: int = 0


@dataclass(frozen=True)
class ModelShape(Dimensions):
    """A decoder's dimensions, under Hugging Face's names, and its parameter counts.

    Attributes:
        intermediate_size: of the layers that have a dense MLP; 0 where none has one.
        num_attention_heads: of a model without attention those of its mixers.
        gated_mlp: an MLP has gate, up and down projections, not only up and down.
        activation: of an MLP, by transformers' name; "" where the config names none.
        experts: None for a dense model.
        has_router_loss: the model adds a load-balancing loss, for which it keeps the router's logits of every layer.
        has_logit_softcap: a tanh bounds the logits.
        has_attention_softcap: a tanh bounds the attention scores.
        has_fused_qkv: queries, keys and values are parts of one projection's output.
        split_rotary_width: of a head, what is rotated apart from the rest; 0 where nothing is.
        rotary_tables: pairs of cosines and sines; more than one where kinds of layers have their own.
        has_sinks: each query head has a sink in its softmax's denominator.
        sliding_windows: the window of each layer that has one, in tokens.
        window_layers: which layers these are, from 0 on.
        other_layers: kinds of layers that are not attention.
        mixer_heads: of these, 0 where they have none that are known.
        indexer: what picks the keys of attention; None where queries see all.
        has_own_attention: its attention, or another mixer, is not one of this project's that works through a layer in
            chunks; nor is attention kept then.
        layer_parameter_count: of the largest layer.
        position_parameter_count: of learned position embeddings, 0 without.
        table_parameter_count: of the embeddings of each layer, which are looked up, 0 without.
        num_model_layers: of the model, of which this may be the first layers.
        layer_embedding_width: of a token's embedding of a layer, 0 without.
        layer_embeddings_width: of those of all layers.
        handed_on_width: of the keys and values of a token that layers hand on to others, 0 without.
        products_beside_layers: multiplications of a token in no layer, beside the head's.
        products_beside_residual: in a layer, beside those of attention and MLP.
        residual_streams: hidden states of a token that go from layer to layer.
        fixed_positions: the most tokens of a document that the model can take, None where any number will do.
        rotary_positions: up to which its RoPE is meant, None where it has none or one that follows the length.
        rope_type: by what its config scales it.
        head_parameter_count: 0 where the head's weight is the embedding's (tie_word_embeddings).
        active_parameter_count: what one token meets: all but the experts that it is not routed to.
        trained: of these parameters those that are trained: all, where `mst_ds.structure.trained` has not counted.
        counts_are_exact: False for a family whose layers are counted as if they were Llama's or Mixtral's.
    """

    tie_word_embeddings: bool
    gated_mlp: bool
    activation: str
    norms: NormShape
    experts: ExpertShape | None
    has_router_loss: bool
    has_logit_softcap: bool
    has_attention_softcap: bool
    has_fused_qkv: bool
    split_rotary_width: int
    rotary_tables: int
    has_sinks: bool
    sliding_windows: tuple[int, ...]
    window_layers: tuple[int, ...]
    other_layers: tuple[str, ...]
    mixer_heads: int
    indexer: IndexerShape | None
    has_own_attention: bool
    embedding_parameter_count: int
    position_parameter_count: int
    table_parameter_count: int
    num_model_layers: int
    layer_embedding_width: int
    layer_embeddings_width: int
    handed_on_width: int
    products_beside_layers: int
    products_beside_residual: int
    residual_streams: int
    fixed_positions: int | None
    rotary_positions: int | None
    rope_type: str
    head_parameter_count: int
    layer_parameter_count: int
    parameter_count: int
    active_parameter_count: int
    trained: TrainedCounts
    counts_are_exact: bool

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> ModelShape:
        """Reads a Hugging Face config.

        Raises:
            ValueError: not a decoder-only causal language model, without a size, or with numbers that none can have.
        """
        check_is_decoder(config)
        check_numbers(config)
        shape = cls.from_fields(config)
        check_parameter_count(config.model_type, shape.parameter_count)
        return shape

    @classmethod
    def from_fields(cls, config: Any) -> ModelShape:
        """Reads what has the fields of a decoder's Hugging Face config; `from_config` makes sure of that.

        Raises:
            ValueError: without a size.
        """
        family = FAMILIES.get(config.model_type, LLAMA)
        dimensions = _dimensions(config)
        experts = read_experts(config, dimensions.num_hidden_layers)
        counts = count_parameters(config, family, dimensions, experts)
        layer_embedding = optional_size(config, "hidden_size_per_layer_input") or 0
        window, window_layers = _sliding_windows(config, dimensions.num_hidden_layers)
        indexer = read_indexer(config, layer_kinds(config))
        picking = set() if indexer is None else {INDEXED_ATTENTION}
        heads_of_mixers, mixers_have_chunks = mixer_heads(
            config,
            picking,
            num_attention_heads=dimensions.num_attention_heads,
            hidden_size=dimensions.hidden_size,
        )
        is_whole = not picking >= set(other_layers(config)) and not mixers_have_chunks
        return cls(
            **vars(dimensions),
            tie_word_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
            gated_mlp=family.gated_mlp,
            activation=_activation(config),
            norms=_norms(config, family, dimensions),
            experts=experts,
            has_router_loss=experts is not None and bool(getattr(config, "output_router_logits", False)),
            has_logit_softcap=bool(getattr(config, "final_logit_softcapping", None)),
            has_attention_softcap=bool(getattr(config, "attn_logit_softcapping", None)),
            has_fused_qkv=family.fused_qkv,
            split_rotary_width=_rotated_width(config, dimensions) if family.splits_rotary else 0,
            rotary_tables=_rotary_tables(config),
            has_sinks=family.sinks,
            sliding_windows=(window,) * len(window_layers),
            window_layers=window_layers,
            other_layers=other_layers(config),
            mixer_heads=heads_of_mixers,
            indexer=indexer,
            has_own_attention=has_two_alibis(config) or is_whole,
            embedding_parameter_count=counts.embedding,
            position_parameter_count=counts.positions,
            table_parameter_count=counts.tables,
            num_model_layers=dimensions.num_hidden_layers,
            layer_embedding_width=layer_embedding,
            layer_embeddings_width=layer_embedding * dimensions.num_hidden_layers,
            handed_on_width=handed_on_width(config, dimensions.layers),
            products_beside_layers=beside_layers(config, dimensions.hidden_size)[1],
            products_beside_residual=products_beside_residual(config, dimensions.hidden_size),
            residual_streams=residual_streams(config),
            fixed_positions=fixed_positions(config),
            rotary_positions=rotary_positions(config),
            rope_type=rope_type(config),
            head_parameter_count=counts.head,
            layer_parameter_count=counts.layer,
            parameter_count=counts.all,
            active_parameter_count=counts.active,
            trained=_all_trained(counts),
            counts_are_exact=config.model_type in FAMILIES,
        )

    @property
    def head_weight_count(self) -> int:
        """Of the head's weight, which may be the embedding's."""
        return self.head_parameter_count or self.embedding_parameter_count

    @property
    def max_sp_size(self) -> int:
        """The most ranks that can share a sequence: each needs a query head, and one of the layers that are not
        attention, without which these need all tokens."""
        heads = min(layer.num_attention_heads for layer in self.layers)
        return max(1, min(heads, self.mixer_heads)) if self.other_layers else heads

    @property
    def is_trained_whole(self) -> bool:
        return self.trained.all == self.parameter_count

    def first_layers(self, count: int) -> ModelShape:
        """The model of its first so many layers, with as few sparse ones as can be; its other counts stay."""
        window_layers = tuple(layer for layer in self.window_layers if layer < count)
        experts = self.experts
        if experts is not None:
            experts = replace(
                experts, num_sparse_layers=max(1, experts.num_sparse_layers - self.num_hidden_layers + count)
            )
        indexer = self.indexer
        if indexer is not None:
            indexer = replace(indexer, num_layers=min(indexer.num_layers, count))
        return replace(
            self,
            **self._sizes_of(count - 1),
            num_hidden_layers=count,
            indexer=indexer,
            layers=self.layers[:count],
            sliding_windows=self.sliding_windows[: len(window_layers)],
            window_layers=window_layers,
            experts=experts,
        )

    @cached_property
    def full_attention_layers(self) -> int:
        """How many have attention without a window."""
        return sum(layer.has_attention for layer in self.layers) - len(self.window_layers)

    @property
    def layers_as_attention(self) -> tuple[str, ...]:
        """The kinds of layers that are counted as if they were attention, which they are not."""
        return () if any(layer.mixer is not None for layer in self.layers) else self.other_layers

    @property
    def is_first_part(self) -> bool:
        """Whether it is the first layers of a model, whose others have embeddings of their own or read their keys."""
        return self.num_hidden_layers < self.num_model_layers

    @property
    def layers_are_alike(self) -> bool:
        return len(set(self.layers)) == 1

    @cached_property
    def kinds(self) -> tuple[ModelShape, ...]:
        """The model with the layers of one shape alone, for each shape, whose sizes are then those of each of its
        layers; in the order of their last layers."""
        if self.layers_are_alike:
            return (self,)
        last = {layer: index for index, layer in enumerate(self.layers)}
        of_each = (
            [index for index, layer in enumerate(self.layers) if layer == kind]
            for kind in sorted(last, key=last.__getitem__)
        )
        return tuple(map(self._with_layers, of_each))

    def _with_layers(self, layers: Sequence[int]) -> ModelShape:
        """The model of these of its layers, which are alike; dense layers are the first ones."""
        window_layers = tuple(place for place, layer in enumerate(layers) if layer in self.window_layers)
        sparse = sum(layer >= self.num_dense_layers for layer in layers)
        experts = replace(self.experts, num_sparse_layers=sparse) if self.experts is not None and sparse else None
        return replace(
            self,
            **self._sizes_of(layers[-1]),
            num_hidden_layers=len(layers),
            layers=tuple(self.layers[layer] for layer in layers),
            sliding_windows=self.sliding_windows[: len(window_layers)],
            window_layers=window_layers,
            experts=experts,
        )

    def _sizes_of(self, layer: int) -> dict[str, Any]:
        """Those of the model's that are a layer's; nothing where all are alike."""
        if self.layers_are_alike:
            return {}
        own, has_norms = self.layers[layer], self.norms.query_key_width > 0
        keys = own.num_key_value_heads * own.has_own_keys
        norms = replace(
            self.norms,
            query_key_width=has_norms * (own.num_attention_heads + keys) * own.head_dim,
            value_width=(self.norms.value_width > 0) * keys * own.value_head_dim,
        )
        return {"norms": norms} | {name: getattr(own, name) for name in _LARGEST_OF_LAYERS}

    def within(self, tokens: int) -> ModelShape:
        """The model on so many tokens, without windows that hide none of them."""
        if not self.sliding_windows or self.sliding_windows[0] < tokens:
            return self
        return replace(self, sliding_windows=(), window_layers=())

    @property
    def num_dense_layers(self) -> int:
        """Layers with one MLP, which every token goes through."""
        return self.num_hidden_layers - (self.experts.num_sparse_layers if self.experts is not None else 0)


def has_two_alibis(config: Any) -> bool:
    """Whether it has ALiBi as Falcon, whose eager attention adds it twice, and torch's once."""
    return bool(getattr(config, "alibi", False))


def _dimensions(config: PreTrainedConfig) -> Dimensions:
    num_layers, state_space = size(config, "num_hidden_layers"), read_state_space(config)
    layers = read_layers(config, num_layers) if state_space is None else (_layer_of(state_space),) * num_layers
    return Dimensions(
        hidden_size=size(config, "hidden_size"),
        num_hidden_layers=len(layers),
        vocab_size=size(config, "vocab_size"),
        layers=layers,
        **{name: max(getattr(layer, name) for layer in layers) for name in _LARGEST_OF_LAYERS},
    )


def _layer_of(state_space: StateSpace) -> LayerShape:
    """With the heads of the state space in place of attention's, and no MLP."""
    heads, width = state_space.heads, state_space.width // state_space.heads
    return LayerShape(heads, heads, head_dim=width, value_head_dim=width, intermediate_size=0)


def _activation(config: PreTrainedConfig) -> str:
    names = (getattr(config, name, None) for name in _ACTIVATION_NAMES)
    return next((name for name in names if isinstance(name, str)), "")


def _all_trained(counts: ParameterCounts) -> TrainedCounts:
    return TrainedCounts(
        all=counts.all,
        layer=counts.layer,
        mlp=None,
        head=counts.head or counts.embedding,
        embedding=(counts.embedding if counts.head else 0) + counts.tables,
        largest=max(counts.embedding, counts.head, counts.tables),
    )


def _norms(config: PreTrainedConfig, family: Family, dimensions: Dimensions) -> NormShape:
    has_qk_norm = family.qk_norm != "none" and is_on(family.has_qk_norm, config)
    heads = dimensions.num_attention_heads + dimensions.num_key_value_heads
    value_width = family.value_norm * dimensions.num_key_value_heads * dimensions.value_head_dim
    query_key_width = has_qk_norm * heads * dimensions.head_dim
    return NormShape(family.norm, family.pre_norms, family.post_norms, query_key_width, value_width)


def _sliding_windows(config: PreTrainedConfig, num_layers: int) -> tuple[int, tuple[int, ...]]:
    """The window and the layers that have it; 0 and none without."""
    window = optional_size(config, "sliding_window")
    if window is None:
        return 0, ()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * num_layers
    return window, tuple(layer for layer, kind in enumerate(kinds[:num_layers]) if kind == "sliding_attention")


def _rotated_width(config: PreTrainedConfig, dimensions: Dimensions) -> int:
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(dimensions.head_dim * parameters.get("partial_rotary_factor", 1.0))


def _rotary_tables(config: PreTrainedConfig) -> int:
    parameters = getattr(config, "rope_parameters", None) or {}
    return max(1, sum(isinstance(of_kind, dict) for of_kind in parameters.values()))
