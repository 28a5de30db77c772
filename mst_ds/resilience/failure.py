"""What a rank says of an error that ends it, in one line; and which ranks did not answer where it waited in vain."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from mst_ds.command_line.exit_protocol import another_rank_ended
from mst_ds.memory.out_of_memory import OutOfMemoryError, explanation
from mst_ds.planner import Plan

# Ranks begin to wait at different times, and so do not give up together.
_GRACE_SECONDS = 5.0
_TIMED_OUT = ("Timed out", "timed out", "timeout")
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def explain(error: BaseException, plan: Plan, hang_timeout: float) -> str:
    """One line of an error that this rank alone has, and others may not; may take some seconds."""
    text = " ".join(str(error).split())
    if isinstance(error, OutOfMemoryError):
        return explanation(error, plan)
    if isinstance(error, OSError) and error.errno is not None:
        return text
    if any(sign in text for sign in _LOST):
        return another_rank_ended(type(error).__name__)
    if any(sign in text for sign in _TIMED_OUT) and dist.is_initialized():
        return f"{_silent_ranks()} did not answer within {hang_timeout:g} s; --hang_timeout says how long ranks wait"
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"


def _silent_ranks() -> str:
    """Names the ranks that do not come here, too: those that wait like this one do, because their wait ends as well."""
    store = PrefixStore("mst_ds/waited", dist.distributed_c10d._get_default_store())
    store.set_timeout(timedelta(seconds=_GRACE_SECONDS))
    try:
        store.set(str(dist.get_rank()), "in vain")
        time.sleep(_GRACE_SECONDS)
        silent = [rank for rank in range(dist.get_world_size()) if not store.check([str(rank)])]
    except RuntimeError:
        silent = [0]  # where the store is kept
    if not silent:
        return "no rank"
    return f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
