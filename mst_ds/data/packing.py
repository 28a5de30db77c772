"""Documents of tokens to samples of equal length, without ever holding all tokens in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.utils.data
from datasets import Dataset
from numpy.typing import NDArray
from torch.nn.functional import pad

from mst_ds.config import IGNORE_INDEX, Packing, TooLong
from mst_ds.data.fitting import fitting_documents, learned_of_documents, tokens_of_documents
from mst_ds.data.groups import counted, documents_of, groups_of
from mst_ds.data.layouts import CutRuns, Layout, Part, WholeDocuments, samples_per_run
from mst_ds.data.order import permutation
from mst_ds.data.sharding import DOCUMENTS, Batch
from mst_ds.data.tokenising import LEARNED
from mst_ds.rows.kinds import ADVANTAGES, INPUT_IDS, OLD_LOGPS


def split_documents(
    tokens: Dataset,
    num_samples: int,
    seq_len: int,
    seed: int,
    packing: Packing = "documents",
    *,
    rows: NDArray[np.int64] | None = None,
    too_long: TooLong = "split",
    group: int = 1,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Parts whole documents, at random, into a training and a held-out part.

    Args:
        tokens: the result of `tokenise`.
        num_samples: held-out samples; the held-out documents fill them all, or with packing "none" give at least so
            many.
        rows: row numbers of the documents; default: all.
        too_long, group: see `PackedDataset`.

    Returns:
        The row numbers in `tokens` of the training and of the held-out documents, each ascending.

    Raises:
        ValueError: what is left for training does not make one sample.
    """
    lengths = tokens_of_documents(tokens)
    rows = np.arange(len(lengths)) if rows is None else rows
    if num_samples == 0:
        return rows, np.arange(0)
    lengths = lengths[rows] if too_long == "split" else np.minimum(lengths[rows], seq_len)
    lengths, seq_len = groups_of(lengths, group).sum(axis=1), seq_len * group
    order = permutation(len(lengths), seed)
    # What each document has, in units of which a sample takes `unit`.
    amounts, unit, name = (
        (samples_per_run(lengths, seq_len), 1, "sample(s)") if packing == "none" else (lengths, seq_len, "token(s)")
    )
    num_held_out = int(np.searchsorted(np.cumsum(amounts[order]), num_samples * unit)) + 1
    left = amounts[order[num_held_out:]].sum()
    # Whole documents make a sample, however few they are.
    if left < (unit if too_long == "split" else 1):
        raise ValueError(
            f"eval_samples is {num_samples} of {seq_len} tokens, but the dataset has {amounts.sum()} {name} in "
            f"{counted(len(lengths), tokens, group)}, and holding whole ones out leaves {left} {name} for training, "
            "not enough for one sample; allowed: fewer eval_samples, a shorter seq_len, or eval_steps 0"
        )
    of_parts = order[num_held_out:], order[:num_held_out]
    training, held_out = (rows[documents_of(np.sort(each), group)] for each in of_parts)
    return training, held_out


class PackedDataset(torch.utils.data.Dataset[Batch]):
    """The tokens of the given documents in samples of at most `seq_len` tokens, filled up with padding.

    With `too_long` "split" what is cut is a run of tokens: with packing "documents" all documents together, one after
    the other, with "none" each by itself. The last sample of a run holds what is left of it, so every token is in
    exactly one sample; but a single token left over is left out, since nothing predicts it and it predicts nothing.
    (Documents that were cut to `seq_len` tokens before EOS was added would give a sample of padding each.) Where a
    sample cuts a document, the next sample takes the rest of it as a document of its own, at positions from 0 and
    without sight of what came before; it goes on in the middle of a text, so no BOS is put before it. A sample in which
    nothing is learned is left out.

    With "truncate" or "drop" no sample cuts a document: with packing "documents" as many whole ones go into a sample as
    have room, with "none" one. Of a document that is longer than `seq_len` the beginning is taken, or nothing.

    The first token of a document, also of such a rest, is no label, since nothing predicts it; each other token that is
    learned, EOS included, is one. So a sample has the loss and the gradients of its documents one by one. Samples are
    read from the memory-mapped Arrow file as they are asked for; only document lengths are held.

    Documents that stay together, the two of a preference, are in one sample, one after the other: it has room for them
    all, and never a part of them.

    Args:
        tokens: the result of `tokenise`.
        seq_len: tokens of a document at most; a sample has S, `group` times as many.
        pad_id: the id on padding.
        documents: row numbers in `tokens`; default: all that `fitting_documents` chooses.
        max_samples: samples after this many are left out; default: none.
        group: documents that stay together. Not with "split".

    Raises:
        ValueError: no document has two tokens, nothing is learned in any sample, or, where documents are cut together,
            all have fewer tokens than `seq_len`.
    """

    def __init__(
        self,
        tokens: Dataset,
        seq_len: int,
        pad_id: int,
        documents: NDArray[np.int64] | None = None,
        max_samples: int | None = None,
        packing: Packing = "documents",
        too_long: TooLong = "split",
        group: int = 1,
    ) -> None:
        self.seq_len = seq_len * group
        self.longest = seq_len
        self.group = group
        self.pad_id = pad_id
        self.packing = packing
        self.too_long = too_long
        self._rows = tokens.with_format("arrow")
        self._documents = (
            fitting_documents(tokens, seq_len, too_long, group=group).rows if documents is None else documents
        )
        lengths = tokens_of_documents(tokens)[self._documents]
        self._lengths = lengths if too_long == "split" else np.minimum(lengths, seq_len)
        self.num_documents = len(lengths)
        self.num_tokens = int(self._lengths.sum())
        self._require_a_sample()
        self._has_learned = LEARNED in tokens.column_names
        self.has_old_logps = OLD_LOGPS in tokens.column_names
        self.is_numbered = group > 1 or ADVANTAGES in tokens.column_names
        # Of text all tokens are learned.
        self.num_learned = self.num_tokens
        if self._has_learned:
            most = None if too_long == "split" else seq_len
            self.num_learned = int(learned_of_documents(tokens, most)[self._documents].sum())
        self._layout: Layout = (
            CutRuns(self._lengths, seq_len, packing)
            if too_long == "split"
            else WholeDocuments(self._lengths, self.seq_len, packing, group)
        )
        samples: Sequence[int] = range(len(self._layout))
        if self._has_learned and too_long == "split":
            samples = [each for each in samples if self._learned(self._layout.part(each)).any()]
        if not samples:
            raise ValueError(
                f"no sample of {seq_len} tokens has one that is learned and not the first of its part of a document; "
                "allowed: a longer seq_len, or --too_long truncate"
            )
        self._samples = samples[:max_samples]

    def _require_a_sample(self) -> None:
        if self._lengths.max(initial=0) < 2:
            raise ValueError(
                f"the dataset has {self.num_tokens} tokens in {self.num_documents} document(s), none of which has a "
                "token to predict; allowed: a dataset with text"
            )
        if self.packing == "documents" and self.too_long == "split" and self.num_tokens < self.seq_len:
            raise ValueError(
                f"seq_len is {self.seq_len}, but the dataset has {self.num_tokens} tokens, not enough for one "
                f"sequence; allowed: a seq_len up to {self.num_tokens}, a larger dataset, or packing 'none'"
            )

    @property
    def fingerprint(self) -> dict[str, int | str]:
        """What tells these samples from others, save those of documents that differ in text but not in number."""
        of_all: dict[str, int | str] = {
            "packing": self.packing,
            "seq_len": self.seq_len,
            "num_samples": len(self),
            "num_tokens": self.num_tokens,
        }
        if self.too_long == "split" and not self._has_learned:
            return of_all
        of_rows = {"too_long": self.too_long, "num_learned": self.num_learned}
        return of_all | of_rows | ({"group": self.group} if self.group > 1 else {})

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Batch:
        """{"input_ids", "labels", "position_ids", "attention_mask"}: (S,)[, "old_logps": (S,)][, "documents": (D,)].

        The labels are the ids, not shifted, `IGNORE_INDEX` on a document's first token, on what is not learned and on
        padding; the positions start at 0 in each document; the mask is 0 on padding and 1 elsewhere. The positions of
        padding count from 0 too, and again after as many as a document has at most: a learned position beyond them may
        not exist. Where answers are compared or weighed "documents" has the row numbers in `tokens`.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        part = self._layout.part(self._samples[index])
        ids = torch.from_numpy(self._read(INPUT_IDS, part).astype(np.int64))
        positions = torch.from_numpy(self._positions(part))
        padding = self.seq_len - len(ids)
        labels = ids.masked_fill(torch.from_numpy(~self._learned(part)), IGNORE_INDEX)
        sample = {
            "input_ids": pad(ids, (0, padding), value=self.pad_id),
            "labels": pad(labels, (0, padding), value=IGNORE_INDEX),
            "position_ids": torch.cat([positions, torch.arange(padding) % self.longest]),
            "attention_mask": pad(torch.ones_like(ids), (0, padding), value=0),
        }
        if self.has_old_logps:
            old_logps = torch.from_numpy(self._read(OLD_LOGPS, part).astype(np.float32))
            sample[OLD_LOGPS] = pad(old_logps, (0, padding))
        if self.is_numbered:
            sample[DOCUMENTS] = torch.from_numpy(self.documents_in(index))
        return sample

    def documents_in(self, index: int) -> NDArray[np.int64]:
        """The row numbers in `tokens` of the documents of a sample."""
        return self._documents[self._layout.part(self._samples[index]).documents]

    def only(self, samples: Iterable[int]) -> PackedDataset:
        """Of this dataset the samples with these numbers."""
        chosen = copy.copy(self)
        chosen._samples = [self._samples[index] for index in samples]
        return chosen

    def _learned(self, part: Part) -> NDArray[np.bool_]:
        """Whether each token of a sample is a label."""
        is_first = self._positions(part) == 0
        return self._read(LEARNED, part).astype(bool) & ~is_first if self._has_learned else ~is_first

    def _positions(self, part: Part) -> NDArray[np.int64]:
        """Of a sample's tokens within their documents, the first of which begins at `part.start`."""
        ends = np.cumsum(self._lengths[part.documents])
        begins = np.concatenate([[part.start], ends[:-1]])
        return np.arange(part.start, part.stop) - np.repeat(begins, np.diff(begins, append=part.stop))

    def _read(self, column: str, part: Part) -> NDArray[np.generic]:
        """Of a sample's tokens what stands in `column`."""
        rows = self._rows[self._documents[part.documents].tolist()][column]
        if self.too_long != "split":
            rows = pc.list_slice(rows, 0, self.longest)
        # Views of the file: of a long document only the tokens of this sample are copied.
        stream = pa.chunked_array([row.flatten() for row in rows.chunks])
        read: NDArray[np.generic] = stream.slice(part.start, part.stop - part.start).to_numpy()
        return read
