"""Results and sweeps for tests, without a launch."""

from __future__ import annotations

from typing import Any

from mst_ds.scaling.result import DONE, MEASURED, Result
from mst_ds.scaling.runner import point_result
from mst_ds.scaling.sweep import Point, Variant


def point(sp_size: int = 1, seq_len: int = 1024, *, num_nodes: int = 1, num_gpus: int = 1, variant: str = "a") -> Point:
    return Point(num_nodes, num_gpus, sp_size, seq_len, Variant(variant))


def done(of: Point, tokens_per_second: float, **fields: Any) -> Result:
    """A step of one sequence for each group of ranks, and tokens that cost as many FLOPs as there are in a sequence."""
    tokens = of.seq_len * of.world_size // of.sp_size
    fields = {
        "source": MEASURED,
        "status": DONE,
        "steps": 3,
        "tokens_per_second": tokens_per_second,
        "step_seconds": tokens / tokens_per_second,
        "tokens_per_step": tokens,
        "flops_per_token": float(of.seq_len),
        "loss": 3.5,
        **fields,
    }
    return point_result(of, **fields)
