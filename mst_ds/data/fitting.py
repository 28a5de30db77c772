"""What is trained of tokenised documents: how long each may be, and whether anything in it is learned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from mst_ds.config import TooLong
from mst_ds.data.groups import are_answers, counted, documents_of, groups_of
from mst_ds.data.tokenising import LEARNED
from mst_ds.rows.kinds import INPUT_IDS

_DONE = {"split": "split", "truncate": "truncated", "drop": "left out"}


@dataclass(frozen=True)
class Fitting:
    """rows: row numbers of the documents that are trained on, ascending. amount: of all documents, pairs or answers.

    num_too_long: those longer than a sequence, but for texts that are split. num_unlearned: those of which nothing is
    learned, or of a pair of one answer, not counting what is left out because it is too long.
    """

    rows: NDArray[np.int64]
    amount: str
    num_too_long: int
    num_unlearned: int

    def note(self, seq_len: int, too_long: TooLong) -> str | None:
        """One line for people, of what is not trained as it stands in the dataset; None where all is."""
        parts = []
        if self.num_too_long:
            parts.append(f"{self.num_too_long:,} are longer than {seq_len} tokens and {_DONE[too_long]}")
        if self.num_unlearned:
            within = " within that length" if too_long == "truncate" else ""
            parts.append(f"{self.num_unlearned:,} have nothing to learn{within} and are left out")
        return f"data: of {self.amount} {'; '.join(parts)}" if parts else None


def fitting_documents(
    tokens: Dataset, seq_len: int, too_long: TooLong, rows: NDArray[np.int64] | None = None, group: int = 1
) -> Fitting:
    """Choose the documents to train on. A document's first token is never learned: nothing predicts it.

    Args:
        tokens: the result of `tokenise`.
        rows: row numbers of the documents to choose from, of whole groups; default: all.
        group: documents that stay together, of which all are trained on or none. An answer is too long where it is so
            behind its own prompt: another prompt's answer, which stands beside it for an estimate alone, is truncated.

    Raises:
        ValueError: nothing is learned of any document.
    """
    lengths = tokens_of_documents(tokens)
    is_there = np.full(len(lengths), rows is None)
    is_there[slice(0) if rows is None else rows] = True
    has_learned = LEARNED in tokens.column_names
    if has_learned:
        is_learned = learned_of_documents(tokens, None if too_long == "split" else seq_len) > 0
    else:
        # Texts that have nothing to predict are not worth a word: they are empty lines.
        is_learned = np.ones(len(lengths), dtype=bool)
    groups_there, groups_learned = (groups_of(each, group).all(axis=1) for each in (is_there, is_learned))
    longer = groups_of(lengths > seq_len, group)
    is_long = groups_there & (longer[:, 0] if are_answers(tokens, group) else longer.any(axis=1))
    fits = groups_there & ~is_long if too_long == "drop" else groups_there
    chosen = np.flatnonzero(fits & groups_learned)
    num_groups = int(groups_there.sum())
    amount = counted(num_groups, tokens, group)
    if num_groups and not len(chosen):
        raise ValueError(
            f"nothing is learned of the {amount} of the dataset, {int(is_long.sum())} of which "
            f"are longer than seq_len, {seq_len}, and {_DONE[too_long]}; allowed: answers of an assistant, completions "
            "or labels within seq_len, or too_long 'split'"
        )
    num_too_long = int(is_long.sum()) if has_learned or too_long != "split" else 0
    num_unlearned = int((fits & ~groups_learned).sum())
    return Fitting(documents_of(chosen, group), amount, num_too_long, num_unlearned)


def tokens_of_documents(tokens: Dataset) -> NDArray[np.int64]:
    """The number of tokens of each row of `tokens`, from the Arrow offsets alone."""
    return _list_lengths(tokens.with_format("arrow")[:][INPUT_IDS])


def learned_of_documents(tokens: Dataset, most: int | None = None) -> NDArray[np.int64]:
    """Of each row's first `most` tokens, or all, the number of those that are learned, but for the first."""
    counts = [np.zeros(0, np.int64)]
    for chunk in tokens.with_format("arrow")[:][LEARNED].chunks:
        lengths = _list_lengths(chunk)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        learned = np.asarray(chunk.flatten().to_numpy(zero_copy_only=False), dtype=bool)
        before = np.concatenate([[0], np.cumsum(learned)])
        first = np.minimum(starts + 1, ends)
        last = ends if most is None else np.maximum(first, np.minimum(ends, starts + most))
        counts.append(before[last] - before[first])
    return np.concatenate(counts)


def _list_lengths(lists: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    lengths: NDArray[np.int64] = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths
