"""The meter of the benchmarks, which many tests read too."""

from benchmarks.live_memory import LiveMemory

__all__ = ["LiveMemory"]
