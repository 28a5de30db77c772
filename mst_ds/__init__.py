"""Long-sequence training for Hugging Face models: MsT chunking inside ZeRO-3 and Ulysses sequence parallelism."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mst_ds.config import GIB
    from mst_ds.minisequence import chunked_log_probs, chunked_loss, chunked_mlp
    from mst_ds.patching import apply_plan, apply_settings, remove_plan
    from mst_ds.planner import Plan, make_plan
    from mst_ds.settings import Settings

__version__ = "0.1.0"

# Imported on first use: planning needs no torch, and the operators need no DeepSpeed.
_HOMES = {
    "GIB": "mst_ds.config",
    "Plan": "mst_ds.planner",
    "Settings": "mst_ds.settings",
    "apply_plan": "mst_ds.patching",
    "apply_settings": "mst_ds.patching",
    "chunked_log_probs": "mst_ds.minisequence",
    "chunked_loss": "mst_ds.minisequence",
    "chunked_mlp": "mst_ds.minisequence",
    "make_plan": "mst_ds.planner",
    "remove_plan": "mst_ds.patching",
}
__all__ = [
    "GIB",
    "Plan",
    "Settings",
    "apply_plan",
    "apply_settings",
    "chunked_log_probs",
    "chunked_loss",
    "chunked_mlp",
    "make_plan",
    "remove_plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mst_ds' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
