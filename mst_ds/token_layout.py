"""Which tokens of a sequence each rank of its group holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mst_ds.geometry import chunk_slices, shard_length


@dataclass(frozen=True)
class TokenLayout:
    """Shards of one length, chunk-major: a rank holds its piece of every chunk, in the order of the chunks.

    With L tokens a rank, chunk i of a shard is `chunk_slices(L, chunks)[i]`, and that of all ranks together is one
    contiguous stretch of the sequence, of which the ranks hold equal pieces in their order. So the exchange of a chunk
    gives each rank its heads of that stretch, and causal work is the same on every rank. With one chunk shards are
    consecutive tokens; short shards have fewer chunks than asked for.

    Whatever depends on which tokens these are asks this class: data, positions, documents, attention's exchanges and
    the preflight. Another order of tokens is a change of this file alone.

    Args:
        sp_size: ranks of the sequence; 1 where it is not sharded, and then the order is that of the sequence.
        chunks: in so many a layer is worked through.
    """

    sp_size: int = 1
    chunks: int = 1

    def padded(self, whole: Tensor, value: int) -> Tensor:
        """(B, T) -> (B, S), with `value` on the right, so that all ranks hold as many tokens."""
        length = whole.shape[1]
        return pad(whole, (0, self.sp_size * shard_length(length, self.sp_size) - length), value=value)

    def local_chunks(self, length: int) -> list[slice]:
        """Of a shard of `length` tokens its chunks."""
        return list(chunk_slices(length, self.chunks))

    def spans(self, length: int) -> list[slice]:
        """For each of the chunks of shards of `length` tokens, the stretch of the whole sequence that all ranks'
        together cover: one after another, without gaps."""
        return [slice(self.sp_size * chunk.start, self.sp_size * chunk.stop) for chunk in self.local_chunks(length)]

    def pieces(self, sp_rank: int, length: int) -> list[slice]:
        """Of each of these stretches the part that a rank holds, as slices of the whole sequence."""
        pieces = []
        for chunk in self.local_chunks(length):
            of_rank = chunk.stop - chunk.start
            start = self.sp_size * chunk.start + sp_rank * of_rank
            pieces.append(slice(start, start + of_rank))
        return pieces

    def part(self, whole: Tensor, sp_rank: int, *, dim: int) -> Tensor:
        """Of a tensor with S tokens in `dim` the L of one rank: a view where they are consecutive, else a copy."""
        size = whole.shape[dim]
        assert size % self.sp_size == 0
        if self.sp_size == 1:
            return whole
        stretches = self.pieces(sp_rank, size // self.sp_size)
        pieces = [whole.narrow(dim, piece.start, piece.stop - piece.start) for piece in stretches]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)

    def split(self, whole: Tensor, *, dim: int) -> list[Tensor]:
        """`part` for each rank."""
        return [self.part(whole, sp_rank, dim=dim) for sp_rank in range(self.sp_size)]

    def join(self, shards: Sequence[Tensor], *, dim: int) -> Tensor:
        """The way back: the tensor of the whole sequence, from those of all ranks."""
        assert len(shards) == self.sp_size
        chunks = self.local_chunks(shards[0].shape[dim])
        pieces = [shard.narrow(dim, part.start, part.stop - part.start) for part in chunks for shard in shards]
        return torch.cat(pieces, dim=dim)

    def positions(self, sp_rank: int, length: int, device: torch.device) -> Tensor:
        """(L,): where in the whole sequence the `length` tokens of a rank stand."""
        pieces = self.pieces(sp_rank, length)
        return torch.cat([torch.arange(piece.start, piece.stop, device=device) for piece in pieces])
