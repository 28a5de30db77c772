"""Dimensions and parameter counts of a decoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mst_ds.model_shape.config_checks import check_numbers, check_parameter_count
from mst_ds.model_shape.counts import Dimensions, ParameterCounts, TrainedCounts, count_parameters
from mst_ds.model_shape.experts import ExpertShape, read_experts
from mst_ds.model_shape.families import FAMILIES, LLAMA, OWN_ATTENTION, Family, NormKind, is_on
from mst_ds.model_shape.positions import fixed_positions, rope_type, rotary_positions
from mst_ds.model_shape.sizes import optional_size, size
from mst_ds.model_shape.state_space import StateSpace, read_state_space

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ATTENTION_LAYERS = frozenset({"full_attention", "attention", "sliding_attention", "chunked_attention"})
_TOKENWISE_LAYERS = frozenset({"mlp", "moe"})
# Heads of layers that are not attention, or channels, which ranks share as they do those of attention.
_MIXER_HEADS = (
    "linear_num_value_heads",
    "linear_num_heads",
    "mamba_n_heads",
    "mamba_num_heads",
    "n_mamba_heads",
    "lru_width",
)
_INTERMEDIATE_NAMES = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_ACTIVATION_NAMES = ("hidden_activation", "hidden_act", "activation_function", "activation")


@dataclass(frozen=True)
class NormShape:
    """The norms of a decoder layer.

    Attributes:
        pre_norms: over the hidden size, with an output that a projection reads.
        post_norms: over the hidden size, with an output that is added to the residual.
        query_key_width: elements of a token's queries and keys that norms work on, 0 without such norms.
    """

    kind: NormKind
    pre_norms: int
    post_norms: int
    query_key_width: int


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
        other_layers: kinds of layers that are not attention; counted as if they were.
        mixer_heads: of these, 0 where they have none that are known.
        has_own_attention: its attention, or another mixer, is not one of this project's that works through a layer in
            chunks; nor is attention kept then.
        layer_parameter_count: of the largest layer.
        position_parameter_count: of learned position embeddings, 0 without.
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
    has_own_attention: bool
    embedding_parameter_count: int
    position_parameter_count: int
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
        _check_is_decoder(config)
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
        window, window_layers = _sliding_windows(config, dimensions.num_hidden_layers)
        mixer_heads, mixers_have_chunks = _mixers(config, dimensions)
        is_whole = bool(other_layers(config)) and not mixers_have_chunks
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
            mixer_heads=mixer_heads,
            has_own_attention=config.model_type in OWN_ATTENTION or is_whole,
            embedding_parameter_count=counts.embedding,
            position_parameter_count=counts.positions,
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
        return (
            max(1, min(self.num_attention_heads, self.mixer_heads)) if self.other_layers else self.num_attention_heads
        )

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
        return replace(
            self,
            num_hidden_layers=count,
            sliding_windows=self.sliding_windows[: len(window_layers)],
            window_layers=window_layers,
            experts=experts,
        )

    def within(self, tokens: int) -> ModelShape:
        """The model on so many tokens, without windows that hide none of them."""
        if not self.sliding_windows or self.sliding_windows[0] < tokens:
            return self
        return replace(self, sliding_windows=(), window_layers=())

    @property
    def num_dense_layers(self) -> int:
        """Layers with one MLP, which every token goes through."""
        return self.num_hidden_layers - (self.experts.num_sparse_layers if self.experts is not None else 0)


def other_layers(config: Any) -> tuple[str, ...]:
    """The kinds of layers that are not attention, such as linear attention, state spaces and convolutions."""
    return tuple(sorted(set(layer_kinds(config)) - _ATTENTION_LAYERS - _TOKENWISE_LAYERS))


def layer_kinds(config: Any) -> list[str]:
    """The kind of each layer, in transformers' words; none where a config does not say."""
    return list(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())


def _dimensions(config: PreTrainedConfig) -> Dimensions:
    state_space = read_state_space(config)
    if state_space is not None:
        return _dimensions_without_attention(config, state_space)
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    head_dim = optional_size(config, "qk_head_dim", "head_dim") or hidden // heads
    key_value_heads = optional_size(config, "num_key_value_heads") or heads
    if heads % key_value_heads:
        raise ValueError(
            f"num_key_value_heads in the config of model type {config.model_type!r} is {key_value_heads}; allowed: a "
            f"divisor of its num_attention_heads, {heads}"
        )
    return Dimensions(
        hidden_size=hidden,
        intermediate_size=optional_size(config, *_INTERMEDIATE_NAMES) or 4 * hidden,  # GPT-2's rule where it says None
        num_hidden_layers=size(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        value_head_dim=optional_size(config, "v_head_dim") or head_dim,
        vocab_size=size(config, "vocab_size"),
    )


def _dimensions_without_attention(config: PreTrainedConfig, state_space: StateSpace) -> Dimensions:
    """With the heads of the state space in place of attention's, and no MLP."""
    return Dimensions(
        hidden_size=size(config, "hidden_size"),
        intermediate_size=0,
        num_hidden_layers=size(config, "num_hidden_layers"),
        num_attention_heads=state_space.heads,
        num_key_value_heads=state_space.heads,
        head_dim=state_space.width // state_space.heads,
        value_head_dim=state_space.width // state_space.heads,
        vocab_size=size(config, "vocab_size"),
    )


def _mixers(config: PreTrainedConfig, dimensions: Dimensions) -> tuple[int, bool]:
    """The heads of layers that are not attention, 0 where none are known, and whether a layer of them is worked through
    in chunks: a scan of channels, and a linear attention without heads of its own, take a shard whole."""
    state_space = read_state_space(config)
    if state_space is not None:
        return state_space.heads, state_space.heads < state_space.width
    if (heads := optional_size(config, *_MIXER_HEADS)) is not None:
        return heads, True
    if expand := optional_size(config, "mamba_expand"):
        return expand * dimensions.hidden_size, False
    if other_layers(config) == ("conv",):
        # A short convolution has none to divide: ranks hand on a few tokens.
        return dimensions.num_attention_heads, True
    return dimensions.num_attention_heads if other_layers(config) == ("linear_attention",) else 0, False


def _activation(config: PreTrainedConfig) -> str:
    names = (getattr(config, name, None) for name in _ACTIVATION_NAMES)
    return next((name for name in names if isinstance(name, str)), "")


def _all_trained(counts: ParameterCounts) -> TrainedCounts:
    return TrainedCounts(
        all=counts.all,
        layer=counts.layer,
        mlp=None,
        head=counts.head or counts.embedding,
        embedding=counts.embedding if counts.head else 0,
        largest=max(counts.embedding, counts.head),
    )


def _norms(config: PreTrainedConfig, family: Family, dimensions: Dimensions) -> NormShape:
    has_qk_norm = family.qk_norm != "none" and is_on(family.has_qk_norm, config)
    heads = dimensions.num_attention_heads + dimensions.num_key_value_heads
    return NormShape(family.norm, family.pre_norms, family.post_norms, has_qk_norm * heads * dimensions.head_dim)


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


def _check_is_decoder(config: PreTrainedConfig) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    # Encoders such as BERT are in the mapping too, for those who set their is_decoder.
    is_decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and (
        type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False)
    )
    if config.is_encoder_decoder or not is_decoder:
        raise ValueError(
            f"model type {config.model_type!r} is not a decoder; allowed: decoder-only causal language "
            "models such as llama, qwen3, mistral, gemma2"
        )
    others = [name for name in type(config).sub_configs if name.startswith(("vision", "audio"))]
    if others and config.get_text_config() is config:
        raise ValueError(
            f"model type {config.model_type!r} is multimodal, with its {others[0]}; allowed: decoders of text alone"
        )
    if (text := config.get_text_config()) is not config:
        raise ValueError(
            f"model type {config.model_type!r} is multimodal; allowed: decoders of text alone, such as its part "
            f"{text.model_type!r}"
        )
