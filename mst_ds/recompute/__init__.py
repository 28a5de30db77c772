"""What a decoder layer keeps from its forward, and what is computed again in its backward."""

from .layers import LayerCall, LayerRecompute
from .random_state import RandomState
from .stores import DeviceStore, HostStore, Kept, KeptOnDevice, Store

__all__ = [
    "DeviceStore",
    "HostStore",
    "Kept",
    "KeptOnDevice",
    "LayerCall",
    "LayerRecompute",
    "RandomState",
    "Store",
]
