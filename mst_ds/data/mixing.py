"""Several datasets as one, each with its share of the documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray

from mst_ds.data.fitting import tokens_of_documents
from mst_ds.data.groups import counted, documents_of
from mst_ds.data.order import permutation


@dataclass(frozen=True)
class Mixture:
    """tokens: of all datasets, one after the other. rows: row numbers of the documents that are taken, ascending.

    note: one line for people, of what is taken of each; None where there is one dataset.
    """

    tokens: Dataset
    rows: NDArray[np.int64]
    note: str | None


def mix(
    names: Sequence[str], tokens: Sequence[Dataset], weights: Sequence[float | None], seed: int, group: int = 1
) -> Mixture:
    """With weights as many documents as there can be in these shares without one of them twice, chosen at random.

    So of one dataset all are taken, and of the others a part. Documents are what is counted, however long each is.

    Args:
        names, tokens, weights: of each dataset its name, the result of `tokenise`, and its weight, as `sources_of` has
            them: all of the weights are None, and then all documents are taken, or none is.
        seed: of the choice, >= 0.
        group: documents that stay together; these are chosen, and counted, as one.
    """
    numbers = [len(each) // group for each in tokens]
    total = min((number / weight for number, weight in zip(numbers, weights, strict=True) if weight), default=0.0)
    rows, notes, before = [], [], 0
    for place, (name, each, weight) in enumerate(zip(names, tokens, weights, strict=True)):
        number = numbers[place]
        num_taken = number if weight is None else min(number, round(weight * total))
        # Of no other order that the seed gives: neither of samples nor of what is held out.
        taken = documents_of(np.sort(permutation(number, seed, place, 1)[:num_taken]), group)
        rows.append(taken + before)
        before += len(each)
        amount = int(tokens_of_documents(each)[taken].sum())
        notes.append(f"{num_taken:,} of {counted(number, each, group)} of {name!r} with {amount:,} tokens")
    whole = tokens[0] if len(tokens) == 1 else concatenate_datasets(list(tokens))
    return Mixture(whole, np.concatenate(rows), f"data: {'; '.join(notes)}" if len(tokens) > 1 else None)
