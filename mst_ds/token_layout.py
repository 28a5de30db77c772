"""Which tokens of a sequence each rank of its group holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mst_ds.geometry import shard_length


@dataclass(frozen=True)
class TokenLayout:
    """Shards of one length, each of consecutive tokens, in the order of the ranks.

    Whatever depends on which tokens these are asks this class: data, positions, documents, attention's exchanges and
    the preflight. Another order of tokens is a change of this file alone.

    Args:
        sp_size: ranks of the sequence; 1 where it is not sharded.
    """

    sp_size: int = 1

    def padded(self, whole: Tensor, value: int) -> Tensor:
        """(B, T) -> (B, S), with `value` on the right, so that all ranks hold as many tokens."""
        length = whole.shape[1]
        return pad(whole, (0, self.sp_size * shard_length(length, self.sp_size) - length), value=value)

    def split(self, whole: Tensor, *, dim: int) -> Sequence[Tensor]:
        """Of a tensor with S tokens in `dim`, for each rank its L tokens: views."""
        assert whole.shape[dim] % self.sp_size == 0
        return whole.chunk(self.sp_size, dim=dim)

    def join(self, shards: Sequence[Tensor], *, dim: int) -> Tensor:
        """The way back: the tensor of the whole sequence, from those of all ranks."""
        assert len(shards) == self.sp_size
        return torch.cat(tuple(shards), dim=dim)

    def positions(self, sp_rank: int, length: int, device: torch.device) -> Tensor:
        """(L,): where in the whole sequence the `length` tokens of a rank stand."""
        return torch.arange(sp_rank * length, (sp_rank + 1) * length, device=device)
