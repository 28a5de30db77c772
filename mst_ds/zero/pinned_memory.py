"""How the blocks of pinned memory that DeepSpeed asks for are rounded, as the environment of a run has it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# Of torch 2.13. A block above either is as long as what is asked for.
_LIMITS_IN_MIB = ("pinned_max_round_threshold_mb", "pinned_max_cached_size_mb")


def largest_rounded_block(environment: Mapping[str, str] = os.environ) -> int:
    """The most bytes that torch rounds up to a power of two; 0 where DeepSpeed locks memory by itself, page by page."""
    if environment.get("DS_PIN_MEMORY_BACKEND", "").strip().lower() == "native":
        return 0
    settings = next((environment[name] for name in _ALLOCATOR if name in environment), "")
    limits = [re.search(rf"(?:^|,)\s*{name}\s*:\s*(\d+)", settings) for name in _LIMITS_IN_MIB]
    return min((int(found[1]) * 2**20 for found in limits if found), default=sys.maxsize)
