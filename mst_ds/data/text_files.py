"""The text of .txt files as a dataset, a document each."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from mst_ds.data.batching import documents_at_once
from mst_ds.rows.kinds import TEXT

# Of a file, for one step of the check that it is UTF-8.
_BYTES_AT_ONCE = 2**22


def read_text_files(files: Sequence[Path]) -> Dataset:
    """One row a file, in the one column "text", with every line ending as a line feed.

    A text stays the bytes that it has in its file: as `str` it would take up to four times as much.

    Raises:
        ValueError: a file is not UTF-8.
        OSError: one cannot be read.
    """
    # A file that has changed is read again.
    known = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    try:
        documents = Dataset.from_generator(
            _rows,
            features=Features({TEXT: Value("large_binary")}),  # `datasets` has text only as `str`
            gen_kwargs={"files": known},
            writer_batch_size=documents_at_once(np.array([size for _, size, _ in known])),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise
    # Without a copy: the same bytes under another name.
    as_text = documents.data.cast(Features({TEXT: Value("large_string")}).arrow_schema)
    return Dataset(as_text, fingerprint=documents._fingerprint)


def _rows(files: Sequence[tuple[str, int, int]]) -> Iterator[dict[str, bytes]]:
    for file, _, _ in files:
        text = Path(file).read_bytes()
        _require_utf8(file, text)
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        yield {TEXT: text}


def _require_utf8(file: str, text: bytes) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(text), _BYTES_AT_ONCE):
            decoder.decode(text[start : start + _BYTES_AT_ONCE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file!r} is not text in UTF-8 ({error}); allowed: UTF-8") from None
