"""How many positions a model has, or has learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mst_ds.model_shape.families import FAMILIES
from mst_ds.model_shape.sizes import optional_size

if TYPE_CHECKING:
    from mst_ds.model_shape.shape import ModelShape

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
    entries, known = rotary_entries(config), optional_size(config, "max_position_embeddings")
    if known is None or not entries:
        return None
    if any("dynamic" in str(entry.get("rope_type")) for entry in entries):
        return None
    return min(max(known, _scaled(entry, known)) for entry in entries)


def rope_type(config: Any) -> str:
    """By what the config scales its RoPE; "default" where it does not."""
    return next((str(entry.get("rope_type") or "default") for entry in rotary_entries(config)), "default")


def rotary_entries(config: Any) -> list[dict[str, Any]]:
    """The `rope_parameters` of layers without a window, where there are such, else of all; none without RoPE.

    A window is shorter than what they know.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    has_rope = bool(parameters) or config.model_type in FAMILIES
    if not has_rope or config.model_type in _TABLES or getattr(config, "alibi", False):
        return []
    kinds = {kind: entry for kind, entry in parameters.items() if isinstance(entry, dict)} or {"": parameters}
    return [entry for kind, entry in kinds.items() if "sliding" not in kind] or list(kinds.values())


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


def unknown_positions(shape: ModelShape, seq_len: int) -> str | None:
    """A warning, in one line, where a sequence is longer than the positions that a model's RoPE knows; else None."""
    known = shape.rotary_positions
    if known is None or seq_len <= known:
        return None
    fix = f"train with --rope_scaling yarn:{-(-seq_len // known)}"
    if shape.rope_type != "default":
        fix = f'raise the factor of its "rope_parameters", of type {shape.rope_type!r}, in its config.json'
    return (
        f"warning: seq_len is {seq_len}, but the model's config knows {known} positions, beyond which its RoPE has "
        f"learned nothing: {fix}, or use --seq_len {known} or less"
    )
