"""Sums over the documents of a batch, of which a rank may hold a shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_ds.sequence_parallel import SequenceGroup
from mst_ds.token_layout import TokenLayout


@dataclass(frozen=True)
class Documents:
    """Which document each token of a rank belongs to.

    of_tokens: (B, L) int64, from 0 in the order of the rows; `count` for padding.
    count: documents of the whole sequences, without padding.
    group: the ranks that hold the shards of these sequences; None where they are whole.
    """

    of_tokens: Tensor
    count: int
    group: SequenceGroup | None = None

    @classmethod
    def of_batch(cls, batch: Mapping[str, Tensor], group: SequenceGroup | None = None) -> Documents:
        """Of a batch as a patched model takes it: by its document table, or without one a document a row.

        Nothing is read from a device where the table is on the CPU.

        Raises:
            ValueError: the table is of another number of ranks than the group.
        """
        tokens = batch["shift_labels"]
        rows, length = tokens.shape
        if "document_table" not in batch:
            return cls(torch.arange(rows, device=tokens.device).unsqueeze(-1).expand(rows, length), rows, group)
        table = batch["document_table"].cpu()
        layout = TokenLayout(*table[0].tolist())
        rank, size = (0, 1) if group is None else (group.rank, group.size)
        if layout.sp_size != size:
            raise ValueError(
                f"the batch was sharded for {layout.sp_size} ranks, and its sequence group has {size}: pass the group "
                "that the model's plan has"
            )
        first, lengths = table[1:].unbind(dim=1)
        is_document = lengths > 0
        count = int(is_document.sum())
        number = torch.where(is_document, is_document.cumsum(0) - 1, count)
        positions = layout.positions(rank, length, table.device)
        index = torch.arange(rows).unsqueeze(-1) * size * length + positions
        of_tokens = number[torch.searchsorted(first.contiguous(), index, right=True) - 1]
        return cls(of_tokens.to(tokens.device, non_blocking=True), count, group)

    def sums(self, values: Tensor) -> Tensor:
        """The sum of (B, L) over the tokens of each document, on all ranks of the group; differentiable.

        Returns:
            (count,) in fp64: the log-probability of 10^5 tokens has few digits left in fp32 once a reference's is
            subtracted from it.
        """
        sums = torch.zeros(self.count + 1, dtype=torch.float64, device=values.device)
        sums = sums.index_add(0, self.of_tokens.flatten(), values.flatten().double())[:-1]
        return sums if self.group is None else _SumOverRanks.apply(sums, self.group)

    def spread(self, values: Tensor) -> Tensor:
        """(count,) -> (B, L): each token has its document's value; padding 0."""
        return torch.cat([values, values.new_zeros(1)])[self.of_tokens]


def num_documents(batch: Mapping[str, Tensor]) -> int:
    """Documents of the whole sequences of a batch, without padding."""
    table = batch.get("document_table")
    return len(batch["shift_labels"]) if table is None else int((table[1:, 1] > 0).sum())


class _SumOverRanks(torch.autograd.Function):
    """The gradient of what all ranks make of a sum is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        total = values.clone()
        group.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        total = grad_output.clone()
        ctx.group.all_reduce(total)
        return total, None
