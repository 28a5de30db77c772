"""The text of .jsonl files, and nothing else of them, as a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from mst_ds.data.batching import documents_at_once
from mst_ds.dataset_files import texts_of_json_lines


def read_json_lines(files: Sequence[Path], column: str) -> Dataset:
    """One row a line, in the one column of this name; see `texts_of_json_lines`."""
    # A file that has changed is read again.
    known = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    try:
        return Dataset.from_generator(
            _rows,
            features=Features({column: Value("large_string")}),
            gen_kwargs={"files": known, "column": column},
            writer_batch_size=documents_at_once(np.fromiter(_lengths(files), np.int64)),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _rows(files: Sequence[tuple[str, int, int]], column: str) -> Iterator[dict[str, str | None]]:
    for file, _, _ in files:
        for text in texts_of_json_lines(file, column):
            yield {column: text}


def _lengths(files: Sequence[Path]) -> Iterator[int]:
    for file in files:
        with file.open("rb") as lines:
            yield from map(len, lines)
