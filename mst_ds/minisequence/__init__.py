"""The two MsT operators (arXiv 2407.15892): work through a shard chunk by chunk, usable without DeepSpeed."""

from .loss import chunked_loss
from .mlp import chunked_mlp

__all__ = ["chunked_loss", "chunked_mlp"]
