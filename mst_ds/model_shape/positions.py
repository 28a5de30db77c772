"""How many positions a model has, or has learned."""

from __future__ import annotations

from typing import Any

from mst_ds.model_shape.families import FAMILIES
from mst_ds.model_shape.sizes import optional_size

# Learned or not, they stand in a table, or attention adds to its scores from one; whatever is longer fails.
_TABLES = frozenset(
    {
        "bert-generation",
        "biogpt",
        "codegen",
        "ctrl",
        "git",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gptj",
        "mpt",
        "openai-gpt",
        "opt",
        "trocr",
    }
)


def fixed_positions(config: Any) -> int | None:
    """The most tokens of a document that the model can take; None without such a limit."""
    return optional_size(config, "max_position_embeddings", "max_seq_len") if config.model_type in _TABLES else None


def rotary_positions(config: Any) -> int | None:
    """Positions up to which the config's RoPE is meant; None without RoPE, or where it follows the length."""
    parameters = getattr(config, "rope_parameters", None) or {}
    has_rope = bool(parameters) or config.model_type in FAMILIES
    known = optional_size(config, "max_position_embeddings")
    if known is None or not has_rope or config.model_type in _TABLES or getattr(config, "alibi", False):
        return None
    kinds = {kind: entry for kind, entry in parameters.items() if isinstance(entry, dict)} or {"": parameters}
    # A window is shorter than any of this.
    entries = [entry for kind, entry in kinds.items() if "sliding" not in kind] or list(kinds.values())
    if any("dynamic" in str(entry.get("rope_type")) for entry in entries):
        return None
    return min(max(known, _scaled(entry, known)) for entry in entries)


def _scaled(parameters: dict[str, Any], known: int) -> int:
    original = parameters.get("original_max_position_embeddings") or known
    return int(original * (parameters.get("factor") or 1.0))


def require_positions(positions: int | None, seq_len: int) -> None:
    """Refuse documents that a model has no positions for.

    Raises:
        ValueError: `seq_len` is more than `positions`.
    """
    if positions is not None and seq_len > positions:
        raise ValueError(
            f"seq_len is {seq_len}, but the model has {positions} positions; allowed: --seq_len {positions} or less"
        )


def unknown_positions(known: int | None, seq_len: int) -> str | None:
    """A warning, in one line, where a sequence is longer than the `known` positions of a model's RoPE; else None."""
    if known is None or seq_len <= known:
        return None
    return (
        f"warning: seq_len is {seq_len}, but the model's config knows {known} positions, beyond which its RoPE has "
        f'learned nothing: scale it by "rope_parameters" in the model\'s config.json, such as "rope_type": "yarn", '
        f'"factor": {-(-seq_len // known)}.0, "original_max_position_embeddings": {known} beside its rope_theta, or '
        f"use --seq_len {known} or less"
    )
