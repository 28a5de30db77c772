"""The text of .jsonl files, and nothing else of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

CHAT_AS_TEXT = "write each chat as text with the tokenizer's apply_chat_template(..., tokenize=False)"
_FIRST_LINES = 1000


def read_json_lines(files: Sequence[Path], column: str) -> Dataset:
    """One row a line, in the one column of this name. The other columns may hold anything, and another thing each line.

    A line without the column, or with null in it, is a row without text.

    Raises:
        ValueError: a line is not JSON in UTF-8, or its column holds no text; with the file and the line.
    """
    # A file that has changed is read again.
    known = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    try:
        return Dataset.from_generator(
            _rows, features=Features({column: Value("large_string")}), gen_kwargs={"files": known, "column": column}
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def first_columns(file: Path) -> list[str]:
    """The columns that a file's first lines have."""
    columns: dict[str, None] = {}
    for _, row in islice(_lines(str(file)), _FIRST_LINES):
        columns |= dict.fromkeys(row)
    return list(columns)


def _rows(files: Sequence[tuple[str, int, int]], column: str) -> Iterator[dict[str, str | None]]:
    for file, _, _ in files:
        for number, row in _lines(file):
            text = row.get(column)
            if not isinstance(text, str | None):
                fix = CHAT_AS_TEXT if isinstance(text, list | dict) else "quotation marks around it"
                raise ValueError(
                    f"line {number} of {file!r} has a {type(text).__name__} in {column!r}, {json.dumps(text)[:60]}; "
                    f"allowed: a column of text; nearest: {fix}"
                )
            if text is not None and not _is_utf8(text):
                raise ValueError(
                    f"line {number} of {file!r} has half a surrogate pair in {column!r}, which is no character; "
                    "allowed: text that can be written in UTF-8"
                )
            yield {column: text}


def _lines(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line that is not blank, with its number from 1."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(text) if text else None
            except (ValueError, RecursionError) as error:  # of which both decoders' errors are
                raise ValueError(
                    f"line {number} of {file!r} is not JSON in UTF-8 ({error}); allowed: one object a line"
                ) from None
            if row is None and not text:
                continue
            if not isinstance(row, dict):
                raise ValueError(f"line {number} of {file!r} is not an object; allowed: one object a line")
            yield number, row


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
