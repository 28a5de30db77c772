"""The rows of .jsonl, .json and .csv files as a dataset, of the columns that are read and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from datasets.exceptions import DatasetGenerationError

from mst_ds.data.batching import documents_at_once
from mst_ds.data.id_rows import require_ids
from mst_ds.rows.files import form_of, opened, rows_of
from mst_ds.rows.json_lines import json_of, require_column, text_of
from mst_ds.rows.kinds import INPUT_IDS, JSON, WHERE, Kind


def read_row_files(files: Sequence[Path], kind: Kind, columns: Sequence[str]) -> Dataset:
    """One row a row: of texts and of ids their columns, of chats `JSON`, which no type of Arrow would hold as it is.

    Beside what is more than a text stands in `WHERE` which row of which file it was.

    Args:
        columns: see `columns_of`.

    Raises:
        ValueError: a row is none of this kind; see `rows_of`, `text_of`, `json_of` and `require_ids`.
    """
    # A file that has changed is read again.
    known = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    try:
        return Dataset.from_generator(
            _rows,
            features=_features(kind, columns),
            # A second list would be shards, too.
            gen_kwargs={"files": known, "kind": kind, "columns": tuple(columns)},
            writer_batch_size=documents_at_once(np.fromiter(_lengths(files), np.int64)),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _features(kind: Kind, columns: Sequence[str]) -> Features:
    if kind == "text":
        return Features({columns[0]: Value("large_string")})
    where = {WHERE: Value("string")}
    if kind == "input_ids":
        return Features({name: ListOf(Value("int64")) for name in columns} | where)
    return Features({JSON: Value("large_string")} | where)


def _rows(files: Sequence[tuple[str, int, int]], kind: Kind, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for file, _, _ in files:
        for where, row in rows_of(Path(file)):
            if kind == "text":
                yield {columns[0]: text_of(row, columns[0], where)}
            elif kind == "input_ids":
                require_column(row, kind, INPUT_IDS, where)
                yield {name: require_ids(row.get(name), name, where) for name in columns} | {WHERE: where}
            else:
                yield {JSON: json_of(row, kind, columns, where), WHERE: where}


def _lengths(files: Sequence[Path]) -> Iterator[int]:
    for file in files:
        if form_of(file) == ".jsonl":
            with opened(file) as lines:
                yield from map(len, lines)
        else:
            yield from (len(json.dumps(row)) for _, row in rows_of(file))
