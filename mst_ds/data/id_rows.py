"""Rows that are token ids already: whether they are, and which of them are learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mst_ds.config import IGNORE_INDEX
from mst_ds.rows.kinds import ATTENTION_MASK, INPUT_IDS, LABELS


def require_ids(values: Any, name: str, where: str) -> list[int] | None:
    """A list of whole numbers, or None for none.

    Raises:
        ValueError: `values` is something else.
    """
    if values is None:
        return None
    if isinstance(values, list) and all(type(value) is int and abs(value) < 2**63 for value in values):
        return values
    raise ValueError(f"{where} has {name!r} that are no list of whole numbers; allowed: ids of tokens")


def ids_and_learned(row: pa.Table, where: str, num_ids: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Of a table of one row the ids, and whether each is learned: all are where there are no labels.

    Args:
        where: names the row, for a message.
        num_ids: ids of the vocabulary, from 0 on.

    Raises:
        ValueError: no ids, one that is not in the vocabulary, labels that are neither the ids nor `IGNORE_INDEX`, or
            padding.
    """
    ids = _numbers(row, INPUT_IDS, where)
    if ids is None:
        raise ValueError(f"{where} has no 'input_ids'; allowed: ids in every row")
    wrong = ids[(ids < 0) | (ids >= num_ids)]
    if len(wrong):
        raise ValueError(f"{where} has the id {wrong[0]}; allowed: the ids of the tokenizer, 0 to {num_ids - 1}")
    mask = _beside(row, ATTENTION_MASK, ids, where)
    if mask is not None and not mask.all():
        raise ValueError(f"{where} has padding, where attention_mask is 0; allowed: ids without padding")
    labels = _beside(row, LABELS, ids, where)
    learned = np.ones(len(ids), dtype=bool) if labels is None else labels != IGNORE_INDEX
    if labels is not None and (differs := learned & (labels != ids)).any():
        at = int(np.flatnonzero(differs)[0])
        raise ValueError(
            f"{where} has the label {labels[at]} at the id {ids[at]}, token {at + 1}; allowed: the id itself, since "
            f"labels are shifted here, or {IGNORE_INDEX}"
        )
    return ids.astype(np.int32), learned


def _beside(row: pa.Table, name: str, ids: NDArray[np.int64], where: str) -> NDArray[np.int64] | None:
    """What a column says of each id; None where it says nothing."""
    values = _numbers(row, name, where)
    if values is not None and len(values) != len(ids):
        raise ValueError(f"{where} has {len(values)} {name} for {len(ids)} ids; allowed: as many")
    return values


def _numbers(row: pa.Table, name: str, where: str) -> NDArray[np.int64] | None:
    if name not in row.column_names:
        return None
    column = row[name].combine_chunks()
    if pa.types.is_null(column.type) or column.null_count:
        return None
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise ValueError(f"{where} has {column.type} as {name!r}; allowed: a list of whole numbers")
    values = column.flatten()
    if values.null_count or not (pa.types.is_integer(values.type) or len(values) == 0):
        raise ValueError(f"{where} has {values.type} in {name!r}; allowed: a list of whole numbers, none of them null")
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.int64)
