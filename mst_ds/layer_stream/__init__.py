"""A decoder layer as a stream over its tokens: forward and backward chunk by chunk (arXiv 2506.03077, StreamBP)."""

from .call import KeysAreThere, LayerCall, Pass
from .stream import LayerStream, StreamedLayer, stream_of

__all__ = ["KeysAreThere", "LayerCall", "LayerStream", "Pass", "StreamedLayer", "stream_of"]
