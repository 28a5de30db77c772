"""What is kept of a forward for its backward, where it lies, and under what it ran."""

from .random_state import Conditions, RandomState
from .stores import DeviceStore, HostStore, Kept, KeptOnDevice, PartStore, Store, read_in_turn

__all__ = [
    "Conditions",
    "DeviceStore",
    "HostStore",
    "Kept",
    "KeptOnDevice",
    "PartStore",
    "RandomState",
    "Store",
    "read_in_turn",
]
