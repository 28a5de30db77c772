"""The user's config made small: every size a few, the architecture the same. By the names of its fields, no class."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mst_ds.model_shape import read_state_space

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_VOCAB_SIZE = 101
_WINDOW = 7  # shorter than most documents, so that it is at work
ORIGINAL_POSITIONS = 9  # the same: frequencies that change beyond the original length have changed

# Widths that nothing else depends on, unlike each other, so that a mixed-up dimension does not go unnoticed.
_WIDTHS: Mapping[str, int] = {
    "intermediate_size": 40,
    "n_inner": 40,
    "ffn_dim": 40,
    "ffn_hidden_size": 40,
    "dff": 40,
    "dim_ff": 40,
    "intermediate_size_mlp": 44,
    "dense_intermediate_size": 44,
    "moe_intermediate_size": 10,
    "expert_ffn_hidden_size": 10,
    "shared_expert_intermediate_size": 14,
    "shared_experts_intermediate_size": 14,
    "moe_shared_expert_intermediate_size": 14,
    "shared_intermediate_size": 14,
    # Multi-head latent attention: query and key have another width than value.
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 10,
    "v_head_dim": 6,
    "o_lora_rank": 12,
    "laurel_rank": 6,
    "hidden_size_per_layer_input": 6,
    "index_head_dim": 8,
    # State-space and linear-attention layers.
    "mamba_d_state": 8,
    "mamba_head_dim": 4,
    "ssm_state_size": 8,
    "mamba_dt_rank": 3,
    "state_size": 8,
    "time_step_rank": 3,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_head_dim": 4,
}
# At most so many; a model that has fewer keeps them.
_COUNTS: Mapping[str, int] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "zero_expert_num": 2,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "n_shared_experts": 2,
    "num_shared_experts": 2,
    "moe_num_shared_experts": 2,
    "kv_n_heads": 2,
    "o_groups": 2,
    "index_n_heads": 16,  # with few of them a score is often 0, and which of equal ones is chosen is left to chance
    "index_topk": _WINDOW,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "n_groups": 2,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "block_size": 8,
    "sliding_window": _WINDOW,
    "sliding_window_size": _WINDOW,
    "attention_window_size": _WINDOW,
    "window_size": _WINDOW,
    "local_attention": _WINDOW,
    "attention_chunk_size": _WINDOW,
    "altup_num_inputs": 3,
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_GROUPS = ("n_group", "num_expert_group")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
# Where a layer counts as several, the second counts layers.
LAYER_COUNTS = ("num_hidden_layers", "num_layers")
_POSITIONS = ("max_position_embeddings", "max_seq_len")
_HEAD_PARTS = ("qk_nope_head_dim", "qk_rope_head_dim")
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_RANDOM = re.compile("dropout|pdrop|layerdrop|jitter_noise")
_WIDTH = re.compile("dim|width|hidden_size|embedding_size")
_SPECIAL_TOKEN = re.compile("_token_(id|ids|index)$")


class _Fields:
    """The arguments of a config's constructor. transformers' common names stand for a config's own ones too."""

    def __init__(self, config: PreTrainedConfig) -> None:
        config = for_all_layers(config)
        self.values = {name: copy.deepcopy(getattr(config, name)) for name in _constructor_names(type(config), config)}
        self._config = config
        self._own_names: Mapping[str, str] = config.attribute_map

    def get(self, name: str) -> Any:
        return self.values.get(self._own_name(name))

    def size(self, name: str) -> int | None:
        """The value where it is a size, None where the field is missing, None or something else."""
        value = self.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    def needed_size(self, name: str) -> int:
        """The same of a size that every decoder has, which may follow from other fields.

        Raises:
            ValueError: there is none.
        """
        value = self.size(name)
        if value is None:
            value = getattr(self._config, name, None)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"its {name} is {value!r}")
        return value

    def put(self, name: str, value: Any) -> None:
        self.values[self._own_name(name)] = value

    def _own_name(self, name: str) -> str:
        own = self._own_names.get(name, name)
        return own if own in self.values else name

    def rope_entries(self) -> list[dict[str, Any]]:
        """The parameters of the rotary embedding: one set, or one for each type of layer."""
        rope = self.get("rope_parameters") or {}
        entries = list(rope.values()) if rope and all(isinstance(entry, dict) for entry in rope.values()) else [rope]
        return [entry for entry in entries if entry]


def shrink_config(config: PreTrainedConfig, *, layers: Sequence[int], seq_len: int) -> PreTrainedConfig:
    """A config of the same architecture with a few thousand parameters.

    Args:
        config: the user's; it is left as it is.
        layers: the decoder layers to keep, of those lists that name a value for each.
        seq_len: S, the longest sequence the small model has to take.

    Raises:
        ValueError: the config has no size of a decoder.
        Exception: whatever the config's class raises where it does not accept the small values.
    """
    fields = _Fields(config)
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        fields.needed_size(name)
    _shrink_layers(fields, layers)
    _shrink_vocabulary(fields)
    if read_state_space(config) is None:
        _shrink_heads(fields)
    else:
        _shrink_state_space(fields)
    _shrink_positions(fields, seq_len)
    for name, size in _small_sizes(fields.size).items():
        fields.put(name, size)
    for name, width in _WIDTHS.items():
        if isinstance(widths := fields.get(name), list):  # of each layer its own
            fields.put(name, [max(1, width * each // max(widths)) for each in widths])
    for part in fields.values.values():
        if hasattr(part, "to_dict"):  # the config of a part, such as DBRX's of its attention
            vars(part).update(_small_sizes(vars(part).get))
    _shrink_expert_groups(fields)
    _shrink_state_space_heads(fields)
    for name in random_fields(config):
        fields.put(name, 0.0)
    fields.values |= {"use_cache": False} if "use_cache" in fields.values else {}
    fields.values.pop("dtype", None)
    overrides = _small_overrides(config, fields, layers)
    if any(overrides.values()):
        fields.values["per_layer_config"] = overrides
    return type(config)(**fields.values)


def _small_overrides(config: PreTrainedConfig, fields: _Fields, layers: Sequence[int]) -> dict[int, dict[str, Any]]:
    """What kept layers have of their own, in proportion to what the others have."""
    if not config.is_heterogeneous:
        return {}
    of_others, overrides = for_all_layers(config), {}
    for index, layer in enumerate(layers):
        of_layer = config.per_layer_config[layer]
        own = {
            name: _in_proportion(getattr(of_layer, name), getattr(of_others, name), fields.get(name))
            for name in config.per_layer_attributes or ()
            if getattr(of_layer, name) != getattr(of_others, name)
        }
        parts = [getattr(of_layer, name, None) or 0 for name in _HEAD_PARTS]
        if own and all(parts) and sum(parts) == of_layer.head_dim:
            own["head_dim"] = sum(own.get(name, fields.get(name)) for name in _HEAD_PARTS)
        overrides[index] = own
    return overrides


def _in_proportion(value: Any, of_others: Any, small: Any) -> Any:
    """A size that is to `small` as `value` is to `of_others`, as far as it can be."""
    if any(type(each) is not int or each < 1 for each in (value, of_others, small)):
        return value
    found = max(1, round(small * value / of_others))
    return found if found != small else small + 1


def _small_sizes(size_of: Callable[[str], Any]) -> dict[str, int]:
    """Of the widths and counts that a config has."""
    widths = {name: width for name, width in _WIDTHS.items() if size_of(name) is not None}
    counts = {name: min(size, count) for name, count in _COUNTS.items() if (size := size_of(name)) is not None}
    return widths | counts


def for_all_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy without the values that single layers have of their own, whose other values cannot be read beside them."""
    plain = copy.copy(config)
    plain.per_layer_config = None
    return plain


def random_fields(config: PreTrainedConfig) -> tuple[str, ...]:
    """The fields that make the model draw random numbers while it trains, such as dropouts."""
    config = for_all_layers(config)
    return tuple(
        name
        for name in _constructor_names(type(config), config)
        if _RANDOM.search(name)
        and isinstance(value := getattr(config, name), int | float)
        and not isinstance(value, bool)
        and value > 0
    )


def _constructor_names(config_class: type, config: PreTrainedConfig) -> list[str]:
    # Attributes that are not arguments follow from those that are; handed on, the old value would win.
    names = {field.name for field in dataclasses.fields(config_class) if field.init}
    names |= set(inspect.signature(config_class).parameters) - {"args", "kwargs", "self"}
    return sorted(name for name in names if hasattr(config, name))


def _shrink_layers(fields: _Fields, layers: Sequence[int]) -> None:
    count = fields.needed_size(LAYER_COUNTS[0])
    for name, value in fields.values.items():
        if isinstance(value, list | tuple) and len(value) == count:
            fields.values[name] = [value[layer] for layer in layers]
        elif (kinds := _repeated(value)) is not None and len(kinds) == count:
            fields.values[name] = [[[kinds[layer] for layer in layers], 1]]
    for name in LAYER_COUNTS:
        if fields.size(name) is not None:
            fields.put(name, len(layers))
    if reading := fields.size("num_kv_shared_layers"):  # the last ones, which read keys and values of earlier ones
        fields.put("num_kv_shared_layers", sum(layer >= count - reading for layer in layers))


def _repeated(value: Any) -> list[Any] | None:
    """What a list of pairs, values and how often they are repeated, stands for (GPT-Neo); None of anything else."""
    try:
        return [kind for kinds, repeats in value for _ in range(repeats) for kind in kinds]
    except (TypeError, ValueError):
        return None


def _shrink_vocabulary(fields: _Fields) -> None:
    old = fields.size("vocab_size")
    assert old is not None
    size = min(old, _VOCAB_SIZE)
    for name, value in fields.values.items():
        if "vocab" in name and value == old:  # of another table over the same tokens
            fields.values[name] = size
        elif "vocab_size" in name and isinstance(value, int) and 0 < value < old:  # of one over some of them
            fields.values[name] = max(1, size * value // old)
        elif _SPECIAL_TOKEN.search(name) and isinstance(value, int):
            fields.values[name] = value % size
        elif _SPECIAL_TOKEN.search(name) and isinstance(value, list):
            fields.values[name] = [token % size for token in value]


def _shrink_heads(fields: _Fields) -> None:
    """Hidden size and heads: as many query heads for each key/value head as before, up to 4."""
    hidden, heads = (fields.needed_size(name) for name in ("hidden_size", "num_attention_heads"))
    key_value = next((size for name in _KEY_VALUE_HEADS if (size := fields.size(name))), heads)
    new_key_value = min(key_value, 4 if key_value == heads else 2)
    new_heads = new_key_value * min(heads // key_value, 4)
    old_head_dim = fields.size("head_dim")
    head_dim = _head_dim(fields, old_head_dim or hidden // heads)
    new_hidden = new_heads * head_dim
    if old_head_dim is not None and old_head_dim * heads != hidden:
        new_hidden = new_heads * (head_dim + head_dim // 2)
    if old_head_dim is not None:
        fields.put("head_dim", head_dim)
    scalar = fields.get("query_pre_attn_scalar")
    if scalar is not None:
        scaled = scalar * head_dim / (old_head_dim or hidden // heads)
        fields.put("query_pre_attn_scalar", max(1, round(scaled)) if isinstance(scalar, int) else scaled)
    for name, value in fields.values.items():
        if _WIDTH.search(name) and type(value) is int and value and value % hidden == 0:
            fields.values[name] = new_hidden * value // hidden  # of something else that is as wide, or twice as wide
    fields.put("hidden_size", new_hidden)
    for name, size in {"num_attention_heads": new_heads, **dict.fromkeys(_KEY_VALUE_HEADS, new_key_value)}.items():
        if fields.size(name) is not None:
            fields.put(name, size)
    _shrink_window_heads(fields, head_dim)


def _shrink_state_space(fields: _Fields) -> None:
    """Of a model without attention: the hidden size, and heads that together are as wide as the expanded one."""
    heads, head_dim = 4, 8
    if fields.size("num_heads") is not None:
        fields.put("num_heads", heads)
        fields.put("head_dim", head_dim)
    fields.put("hidden_size", heads * head_dim // fields.needed_size("expand"))


def _shrink_window_heads(fields: _Fields, head_dim: int) -> None:
    """Of layers with a window, where they have heads of their own: as many queries for each key as before, up to 4."""
    heads, key_value = (fields.size(f"swa_num_{name}_heads") for name in ("attention", "key_value"))
    if heads is None or key_value is None:
        return
    fields.put("swa_num_key_value_heads", 2)
    fields.put("swa_num_attention_heads", 2 * min(heads // key_value, 4))
    for name in ("swa_head_dim", "swa_v_head_dim"):
        if fields.size(name) is not None:
            fields.put(name, head_dim)


def _head_dim(fields: _Fields, old: int) -> int:
    """The smallest that every part of a head that is rotated leaves with whole pairs."""
    rotary_dim = fields.size("rotary_dim")
    factors = [entry.get("partial_rotary_factor", 1.0) for entry in fields.rope_entries()]
    factors += [factor for name in ("partial_rotary_factor", "rotary_pct") if (factor := fields.get(name)) is not None]
    factors += [rotary_dim / old] if rotary_dim is not None else []
    # Dynamic frequencies of a single pair are a division by zero.
    least = 4 if any(entry.get("rope_type") == "dynamic" for entry in fields.rope_entries()) else 2
    head_dim = 4
    while any(int(head_dim * factor) % 2 or int(head_dim * factor) < least for factor in factors):
        head_dim *= 2
        if head_dim >= old:
            return old
    if rotary_dim is not None:
        fields.put("rotary_dim", head_dim * rotary_dim // old)
    for entry in fields.rope_entries():
        pairs = int(head_dim * entry.get("partial_rotary_factor", 1.0)) // 2
        for name in ("short_factor", "long_factor"):
            if isinstance(values := entry.get(name), list):
                entry[name] = [values[index * len(values) // pairs] for index in range(pairs)]
    return head_dim


def _shrink_positions(fields: _Fields, seq_len: int) -> None:
    """Learned positions as long as the sequence; the original length of a scaled rotary embedding shorter than it."""
    lengths = [name for name in _POSITIONS if fields.size(name) is not None]
    if not fields.rope_entries():
        for name in lengths:
            fields.put(name, seq_len)
    for entry in fields.rope_entries():
        if entry.get("rope_type") not in _LENGTH_DEPENDENT_ROPE:
            continue
        original = fields.size("original_max_position_embeddings") or entry.get("original_max_position_embeddings")
        if entry["rope_type"] == "dynamic":
            original = None  # what the model has positions for
        for name in lengths:
            fields.put(name, round(ORIGINAL_POSITIONS * fields.get(name) / (original or fields.get(name))))
        entry["original_max_position_embeddings"] = ORIGINAL_POSITIONS
        if original is not None and fields.size("original_max_position_embeddings") is not None:
            fields.put("original_max_position_embeddings", ORIGINAL_POSITIONS)


def _shrink_expert_groups(fields: _Fields) -> None:
    """Experts that are chosen by groups: two groups of four experts, of which one is chosen."""
    if not any((fields.size(name) or 1) > 1 for name in _EXPERT_GROUPS):
        return
    for name, value in {**dict.fromkeys(_EXPERTS, 8), **dict.fromkeys(_EXPERT_GROUPS, 2), "topk_group": 1}.items():
        if fields.size(name) is not None:
            fields.put(name, value)


def _shrink_state_space_heads(fields: _Fields) -> None:
    """Heads that together are as wide as the expanded hidden size."""
    if fields.size("mamba_n_heads") is None:
        return
    width = (fields.size("mamba_expand") or 1) * (fields.size("hidden_size") or 1)
    fields.put("mamba_n_heads", 4)
    for name, size in {"mamba_d_head": width // 4, "mamba_d_ssm": width}.items():
        if fields.size(name) is not None:
            fields.put(name, size)
