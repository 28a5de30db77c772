"""The MsT operators (arXiv 2407.15892): work through a shard chunk by chunk, usable without DeepSpeed."""

from .chunks import GradientSum, ParameterSums, chunks_in_cache, hooks_put_off
from .experts import ExpertEnds, chunked_experts
from .linear_sums import SumLinearGradients
from .log_probs import chunked_log_probs, chunked_log_probs_of_head
from .loss import chunked_loss, chunked_loss_of_head
from .mlp import KeptProjections, chunked_mlp
from .norm import chunked_rms_norm
from .rotary import rotary_embedding
from .tokenwise import chunked_tokenwise

__all__ = [
    "ExpertEnds",
    "GradientSum",
    "KeptProjections",
    "ParameterSums",
    "SumLinearGradients",
    "chunked_experts",
    "chunked_log_probs",
    "chunked_log_probs_of_head",
    "chunked_loss",
    "chunked_loss_of_head",
    "chunked_mlp",
    "chunked_rms_norm",
    "chunked_tokenwise",
    "chunks_in_cache",
    "hooks_put_off",
    "rotary_embedding",
]
