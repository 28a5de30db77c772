"""The mixture of experts of a config, under the names that families give its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mst_ds.model_shape.sizes import optional_size, size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_COUNT = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
_INTERMEDIATE = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
_SHARED_SIZE = ("shared_expert_intermediate_size", "shared_intermediate_size")
_SHARED_COUNT = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_SWITCHES = ("is_moe", "enable_moe_block")
_STEP = ("decoder_sparse_step", "moe_layer_interval")


@dataclass(frozen=True)
class ExpertShape:
    """The experts of a layer, and how many layers have them.

    intermediate_size is one expert's; shared_intermediate_size that of the MLP beside the experts that every token
    goes through, 0 without one. Other layers have a dense MLP.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    shared_intermediate_size: int
    num_sparse_layers: int


def read_experts(config: PreTrainedConfig, num_layers: int) -> ExpertShape | None:
    """None for a dense model.

    Raises:
        ValueError: a mixture of experts that does not say how many experts a token goes to, or says more than it has.
    """
    count = optional_size(config, *_COUNT)
    if count is None or any(getattr(config, name, True) is False for name in _SWITCHES):
        return None
    sparse_layers = _count_sparse_layers(config, num_layers)
    if sparse_layers == 0:
        return None
    per_token = size(config, *_PER_TOKEN)
    if per_token > count:
        raise ValueError(
            f"num_experts_per_tok in the config of model type {config.model_type!r} is {per_token}; allowed: 1 to its "
            f"number of experts, {count}"
        )
    intermediate = size(config, *_INTERMEDIATE)
    shared = optional_size(config, *_SHARED_SIZE) or intermediate * (optional_size(config, *_SHARED_COUNT) or 0)
    if getattr(config, "enable_moe_block", False):  # beside the layer's own MLP
        shared = size(config, "intermediate_size")
    return ExpertShape(
        num_experts=count,
        num_experts_per_tok=per_token,
        intermediate_size=intermediate,
        shared_intermediate_size=shared,
        num_sparse_layers=sparse_layers,
    )


def _count_sparse_layers(config: PreTrainedConfig, num_layers: int) -> int:
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds:
        return sum(kind == "sparse" for kind in kinds[:num_layers])
    if isinstance(moe_layers := getattr(config, "moe_layers", None), list):
        return len(moe_layers)
    dense = set(getattr(config, "mlp_only_layers", None) or ()) | set(range(optional_size(config, *_DENSE_FIRST) or 0))
    step = optional_size(config, *_STEP) or 1
    return sum(index not in dense and (index + 1) % step == 0 for index in range(num_layers))
