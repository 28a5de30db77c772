"""What decoder layers have beside their projections' matrices, for each family: the table that counts are read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# "layer": torch's LayerNorm, with a bias. "rms": transformers' RMSNorm as Llama has it, which returns to the model's
# dtype before it multiplies by its weight. "rms_fp32": one that multiplies first, as Gemma's. "layer_fp32": the same
# with a mean, as Cohere's.
NormKind: TypeAlias = Literal["layer", "rms", "rms_fp32", "layer_fp32"]
# A name stands for the field of the config that says whether.
Switch: TypeAlias = bool | str


def is_on(switch: Switch, config: PreTrainedConfig) -> bool:
    """Whether a config has what `switch` stands for; a field that it has not is off."""
    return bool(getattr(config, switch, False)) if isinstance(switch, str) else switch


@dataclass(frozen=True)
class Family:
    """The defaults are Llama's.

    gated_mlp: gate, up and down projections; False: up and down.
    fused_qkv: one projection gives queries, keys and values, and rotary embeddings make new queries and keys.
    splits_rotary: queries and keys are rotated in part and put together again, where their projections' outputs stay.
    pre_norms: norms over the hidden size whose output a projection reads.
    post_norms: norms over the hidden size whose output is added to the residual.
    qk_norm: norms of queries and keys, over a head's dimension or over all heads together.
    has_qk_norm: whether this config has them.
    value_norm: a norm of values over a head's dimension, without weights.
    sinks: a parameter for each query head, in the softmax's denominator.
    shared_gate: a gate that weighs the shared expert.
    """

    qkv_bias: Switch = "attention_bias"
    output_bias: Switch = "attention_bias"
    mlp_bias: Switch = "mlp_bias"
    head_bias: Switch = False
    gated_mlp: bool = True
    fused_qkv: bool = False
    splits_rotary: bool = False
    norm: NormKind = "rms"
    pre_norms: int = 2
    post_norms: int = 0
    qk_norm: Literal["none", "head", "all_heads"] = "none"
    has_qk_norm: Switch = True
    value_norm: bool = False
    learned_positions: bool = False
    sinks: bool = False
    router_bias: bool = False
    shared_gate: bool = False


LLAMA = Family()
_NO_BIAS = Family(qkv_bias=False, output_bias=False, mlp_bias=False)
_COHERE = Family(mlp_bias=False, norm="layer_fp32", pre_norms=1, qk_norm="all_heads", has_qk_norm="use_qk_norm")
_GEMMA2 = Family(mlp_bias=False, norm="rms_fp32", post_norms=2)
_GEMMA3 = replace(_GEMMA2, qk_norm="head")
_GEMMA4 = replace(_GEMMA3, value_norm=True)
_GLM = Family(output_bias=False, mlp_bias=False)
_OLMO2 = Family(mlp_bias=False, norm="rms_fp32", pre_norms=0, post_norms=2, qk_norm="all_heads")
_PLAIN_MLP = Family(gated_mlp=False, norm="layer")
_QWEN3 = Family(mlp_bias=False, qk_norm="head")
_STATE_SPACE = Family(pre_norms=1)  # `state_space` counts the rest

# Those whose counts are exact: the tests compare each with the model built on the meta device.
FAMILIES: Mapping[str, Family] = {
    "arcee": Family(gated_mlp=False),
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, qk_norm="none"),
    "deepseek_v3": Family(mlp_bias=False),
    "exaone4": replace(_NO_BIAS, pre_norms=0, post_norms=2, qk_norm="head"),
    "falcon_mamba": _STATE_SPACE,
    "gemma": replace(_GEMMA2, post_norms=0),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gemma3n_text": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "glm": _GLM,
    "glm4": replace(_GLM, post_norms=2),
    "glm4_moe": replace(_GLM, qk_norm="head", has_qk_norm="use_qk_norm"),
    "gpt2": replace(_PLAIN_MLP, qkv_bias=True, output_bias=True, mlp_bias=True, learned_positions=True),
    "gpt_neox": replace(_PLAIN_MLP, mlp_bias=True, fused_qkv=True),
    "gpt_oss": Family(mlp_bias=True, norm="rms_fp32", sinks=True, router_bias=True),
    "granite": LLAMA,
    "granitemoe": Family(mlp_bias=False),
    "llama": LLAMA,
    "mamba": _STATE_SPACE,
    "mamba2": _STATE_SPACE,
    "minimax_m2": replace(_NO_BIAS, qk_norm="all_heads"),
    "ministral3": _NO_BIAS,
    "mistral": _NO_BIAS,
    "mixtral": _NO_BIAS,
    "nemotron": _PLAIN_MLP,
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "olmoe": Family(mlp_bias=False, qk_norm="all_heads"),
    "phi": replace(
        _PLAIN_MLP,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
        splits_rotary=True,
        pre_norms=1,
        qk_norm="head",
        has_qk_norm="qk_layernorm",
    ),
    "phi3": replace(_NO_BIAS, fused_qkv=True),
    "qwen2": replace(_NO_BIAS, qkv_bias=True),
    "qwen2_moe": replace(_NO_BIAS, qkv_bias="qkv_bias", shared_gate=True),
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3,
    "seed_oss": Family(output_bias="attention_out_bias"),
    "smollm3": LLAMA,
    "starcoder2": replace(_PLAIN_MLP, qkv_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias"),
}
