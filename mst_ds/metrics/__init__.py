"""What a training run measures, and where it is written.

In the output folder: `metrics.jsonl` (one strict JSON object a line), `tensorboard/` (event files) and, at
the end, `summary.json`; also in wandb or trackio, where the user asks for it. On stdout: a progress bar, or a
plain line now and then where it is no terminal.
"""

from mst_ds.metrics.environment import (
    device_name,
    package_versions,
    peak_flops,
    peak_memory_bytes,
    reserved_bytes,
    resident_bytes,
)
from mst_ds.metrics.records import PlannedMemory
from mst_ds.metrics.sinks import Sink
from mst_ds.metrics.trackers import start_trackers
from mst_ds.metrics.writer import MetricsWriter

__all__ = [
    "MetricsWriter",
    "PlannedMemory",
    "Sink",
    "device_name",
    "package_versions",
    "peak_flops",
    "peak_memory_bytes",
    "reserved_bytes",
    "resident_bytes",
    "start_trackers",
]
