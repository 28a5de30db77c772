"""The sequences of a preflight: once packed or padded as a run gets them, once with each document alone in its row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from mst_ds.config import IGNORE_INDEX
from mst_ds.document_table import document_table
from mst_ds.token_layout import TokenLayout

_PADDING = 6


@dataclass(frozen=True)
class Documents:
    """Documents of random tokens with random targets, in the rows of a batch.

    Args:
        rows: for each row of the batch the lengths of its documents, from its first position on; what is left of the
            row is padding.
        seq_len: S, the length of a row.
        vocab_size: ids are below it.
    """

    rows: tuple[tuple[int, ...], ...]
    seq_len: int
    vocab_size: int

    @classmethod
    def packed(cls, seq_len: int, vocab_size: int) -> Documents:
        """Borders within shards, documents across the border of two shards, and one of a single token."""
        first, middle = seq_len // 3, seq_len // 2 + 3
        return cls(((first, seq_len - first - 5, 1, 4), (middle, seq_len - middle)), seq_len, vocab_size)

    @classmethod
    def padded(cls, seq_len: int, vocab_size: int) -> Documents:
        """One document a row, the second shorter than the row, the third than any length that changes anything."""
        return cls(((seq_len,), (seq_len - _PADDING,), (_PADDING,)), seq_len, vocab_size)

    @property
    def batch_size(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Of each document."""
        return [length for _, _, length in self._spans()]

    @property
    def num_items(self) -> int:
        """Targets that count, in the whole batch."""
        return sum(int((targets != IGNORE_INDEX).sum()) for _, targets in self._texts())

    def shard(self, sp_rank: int, layout: TokenLayout) -> dict[str, Tensor]:
        """What a rank of a run gets of the batch: ids, shifted labels, positions, mask, (B, L) each, and the table."""
        whole = {
            "input_ids": torch.zeros(self.batch_size, self.seq_len, dtype=torch.long),
            "shift_labels": torch.full((self.batch_size, self.seq_len), IGNORE_INDEX),
            # On padding too they count from 0, as those of a run do.
            "position_ids": torch.arange(self.seq_len).repeat(self.batch_size, 1),
            "attention_mask": torch.zeros(self.batch_size, self.seq_len, dtype=torch.long),
        }
        for (row, start, length), (ids, targets) in zip(self._spans(), self._texts(), strict=True):
            part = slice(start, start + length)
            whole["input_ids"][row, part] = ids
            whole["shift_labels"][row, part] = targets
            whole["attention_mask"][row, part] = 1
            whole["position_ids"][row, part.stop :] = torch.arange(self.seq_len - part.stop)
        fill = {"shift_labels": IGNORE_INDEX}
        whole = {name: layout.padded(values, fill.get(name, 0)) for name, values in whole.items()}
        shards = {name: layout.part(values, sp_rank, dim=1).contiguous() for name, values in whole.items()}
        return shards | {"document_table": document_table(whole["position_ids"], whole["attention_mask"], layout)}

    def as_rows(self) -> dict[str, Tensor]:
        """Each document alone in a row: ids, labels (not shifted) and mask, padded on the right to the longest."""
        texts = list(self._texts())
        # The target of a last token stands where padding begins, which no other token sees. The longest has none.
        labels = [pad(targets, (1, 0), value=IGNORE_INDEX) for _, targets in texts]
        longest = max(len(ids) for ids, _ in texts)
        return {
            "input_ids": pad_sequence([ids for ids, _ in texts], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)[:, :longest].contiguous(),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids, _ in texts], batch_first=True),
        }

    def tokens_of_batch(self, values: Tensor) -> Tensor:
        """(B, S, ...) -> (T, ...): what belongs to a token, document by document, without what belongs to padding."""
        return torch.cat([values[row, start : start + length] for row, start, length in self._spans()])

    def tokens_of_rows(self, values: Tensor) -> Tensor:
        """(documents, longest, ...) -> (T, ...), in the same order."""
        return torch.cat([values[index, :length] for index, (_, _, length) in enumerate(self._spans())])

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        """Row, first position and length of each document."""
        for row, lengths in enumerate(self.rows):
            start = 0
            for length in lengths:
                yield row, start, length
                start += length

    def _texts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and targets of each document. Every token has a target, its last too, save some that are ignored."""
        generator = torch.Generator().manual_seed(1)
        longest = max(length for lengths in self.rows for length in lengths)
        for _, _, length in self._spans():
            ids, targets = torch.randint(0, self.vocab_size, (2, length), generator=generator)
            targets[2:5] = IGNORE_INDEX
            if length == longest:
                targets[-1] = IGNORE_INDEX
            yield ids, targets
