"""Documents of tokens to samples of equal length, without ever holding all tokens in memory."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.utils.data
from datasets import Dataset
from numpy.typing import NDArray
from torch.nn.functional import pad

from mst_ds.config import IGNORE_INDEX, Packing
from mst_ds.data.order import permutation
from mst_ds.data.sharding import Batch


def tokens_of_documents(tokens: Dataset) -> NDArray[np.int64]:
    """The number of tokens of each row of `tokens`, from the Arrow offsets alone."""
    column = tokens.with_format("arrow")[:]["input_ids"]
    return pc.list_value_length(column).to_numpy().astype(np.int64)


def samples_per_run(run_lengths: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """The number of samples that each run of tokens is cut into, not counting one of a single token."""
    return -(-(run_lengths - 1) // seq_len)


def split_documents(
    tokens: Dataset, num_samples: int, seq_len: int, seed: int, packing: Packing = "documents"
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Parts whole documents, at random, into a training and a held-out part.

    Args:
        tokens: the result of `tokenise`.
        num_samples: held-out samples of `seq_len` tokens; the held-out documents fill them all, or with packing
            "none" give at least so many.

    Returns:
        The row numbers in `tokens` of the training and of the held-out documents, each ascending.

    Raises:
        ValueError: what is left for training does not make one sample.
    """
    lengths = tokens_of_documents(tokens)
    if num_samples == 0:
        return np.arange(len(lengths)), np.arange(0)
    order = permutation(len(lengths), seed)
    # What each document has, in units of which a sample takes `unit`.
    amounts, unit, name = (
        (samples_per_run(lengths, seq_len), 1, "sample(s)") if packing == "none" else (lengths, seq_len, "token(s)")
    )
    num_held_out = int(np.searchsorted(np.cumsum(amounts[order]), num_samples * unit)) + 1
    left = amounts[order[num_held_out:]].sum()
    if left < unit:
        raise ValueError(
            f"eval_samples is {num_samples} of {seq_len} tokens, but the dataset has {amounts.sum()} {name} in "
            f"{len(lengths)} document(s), and holding whole documents out leaves {left} {name} for training, not "
            "enough for one sample; allowed: fewer eval_samples, a shorter seq_len, or eval_steps 0"
        )
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


class PackedDataset(torch.utils.data.Dataset[Batch]):
    """The tokens of the given documents, one after the other, cut into samples of at most `seq_len` tokens.

    What is cut is a run of tokens: with packing "documents" all documents together, with "none" each by itself. The
    last sample of a run holds what is left of it and is filled up with padding, so every token is in exactly one
    sample; but a single token left over is left out, since nothing predicts it and it predicts nothing. (Documents that
    were cut to `seq_len` tokens before EOS was added would give a sample of padding each.) Samples are read from the
    memory-mapped Arrow file as they are asked for; only document lengths are held.

    Where a sample cuts a document, the next sample takes the rest of it as a document of its own, at positions from 0
    and without sight of what came before; it goes on in the middle of a text, so no BOS is put before it. The first
    token of a document, also of such a rest, is no label, since nothing predicts it; each other token, EOS included, is
    one. So a sample has the loss and the gradients of its documents one by one.

    Args:
        tokens: the result of `tokenise`.
        seq_len: S, in tokens.
        pad_id: the id on padding.
        documents: row numbers in `tokens`; default: all.
        max_samples: samples after this many are left out; default: none.

    Raises:
        ValueError: no document has two tokens, or, with packing "documents", all have fewer than `seq_len` together.
    """

    def __init__(
        self,
        tokens: Dataset,
        seq_len: int,
        pad_id: int,
        documents: NDArray[np.int64] | None = None,
        max_samples: int | None = None,
        packing: Packing = "documents",
    ) -> None:
        lengths = tokens_of_documents(tokens)
        self.seq_len = seq_len
        self.pad_id = pad_id
        self.packing = packing
        self._rows = tokens.with_format("arrow")
        self._documents = np.arange(len(lengths)) if documents is None else documents
        lengths = lengths[self._documents]
        # Document d of `_documents` is tokens [ends[d - 1], ends[d]) of the stream of all documents.
        self._ends = np.cumsum(lengths)
        self.num_documents = len(lengths)
        self.num_tokens = int(lengths.sum())
        if lengths.max(initial=0) < 2:
            raise ValueError(
                f"the dataset has {self.num_tokens} tokens in {len(lengths)} document(s), none of which has a token to "
                "predict; allowed: a dataset with text"
            )
        if packing == "documents" and self.num_tokens < seq_len:
            raise ValueError(
                f"seq_len is {seq_len}, but the dataset has {self.num_tokens} tokens, not enough for one "
                f"sequence; allowed: a seq_len up to {self.num_tokens}, a larger dataset, or packing 'none'"
            )
        self._run_ends = self._ends if packing == "none" else self._ends[-1:]
        # Run r is samples [sample_ends[r - 1], sample_ends[r]).
        self._sample_ends = np.cumsum(samples_per_run(np.diff(self._run_ends, prepend=0), seq_len))
        num_samples = int(self._sample_ends[-1])
        self._num_samples = num_samples if max_samples is None else min(num_samples, max_samples)

    @property
    def fingerprint(self) -> dict[str, int | str]:
        """What tells these samples from others, save those of documents that differ in text but not in number."""
        return {
            "packing": self.packing,
            "seq_len": self.seq_len,
            "num_samples": len(self),
            "num_tokens": self.num_tokens,
        }

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Batch:
        """{"input_ids", "labels", "position_ids", "attention_mask"}: (S,) int64.

        The labels are the ids, not shifted, `IGNORE_INDEX` on a document's first token and on padding; the positions
        start at 0 in each document; the mask is 0 on padding and 1 elsewhere. The positions of padding count from 0
        too: so they stay below S, as a learned position has to, and all padding is one document, not one a token.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, stop = self._bounds(index)
        ids = torch.from_numpy(self._read(start, stop))
        positions = torch.from_numpy(self._positions(start, stop))
        padding = self.seq_len - len(ids)
        labels = ids.masked_fill(positions == 0, IGNORE_INDEX)
        return {
            "input_ids": pad(ids, (0, padding), value=self.pad_id),
            "labels": pad(labels, (0, padding), value=IGNORE_INDEX),
            "position_ids": torch.cat([positions, torch.arange(padding)]),
            "attention_mask": pad(torch.ones_like(ids), (0, padding), value=0),
        }

    def _bounds(self, index: int) -> tuple[int, int]:
        """Sample `index` is tokens [start, stop) of the stream."""
        run = int(np.searchsorted(self._sample_ends, index, side="right"))
        first_sample, first_token = (int(ends[run - 1]) if run else 0 for ends in (self._sample_ends, self._run_ends))
        start = first_token + (index - first_sample) * self.seq_len
        return start, min(start + self.seq_len, int(self._run_ends[run]))

    def _positions(self, start: int, stop: int) -> NDArray[np.int64]:
        """Of tokens [start, stop) of the stream within their documents, the first of which begins at `start`."""
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        begins = np.concatenate([[start], self._ends[first:last]])
        return np.arange(start, stop) - np.repeat(begins, np.diff(begins, append=stop))

    def _read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of the stream."""
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        rows = self._rows[self._documents[first : last + 1].tolist()]["input_ids"]
        # Views of the file: of a long document only the tokens of this sample are copied.
        stream = pa.chunked_array([row.flatten() for row in rows.chunks])
        before = int(self._ends[first - 1]) if first else 0
        return stream.slice(start - before, stop - start).to_numpy().astype(np.int64)
