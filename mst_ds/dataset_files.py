"""The files of a local dataset, and whether they can be one: read in a moment, without the libraries of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mst_ds.config import TrainConfig, nearest
from mst_ds.files.read_file import expanded

PYTHON_STDLIB = "python_stdlib"
TEXT = "text"
ALLOWED = f"{PYTHON_STDLIB!r}, a .txt, .jsonl or .parquet file or folder of them, or a Hugging Face dataset id"
# What a chat template writes would not do: its control tokens would be letters.
CHAT_AS_TEXT = "chats as plain text, in which control tokens such as '<|im_end|>' are only letters"
SPLIT_WORDS = {
    "train": ["train", "training"],
    "validation": ["validation", "valid", "dev", "val"],
    "test": ["test", "testing", "eval", "evaluation"],
}
"""What says a split in the name of a file or folder, as in `datasets`."""

_KINDS = (".txt", ".jsonl", ".parquet")
_CHATS = {"messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected"}
_FIRST_LINES = 1000
# Of a text, for one step of the check that it can be written.
_CHARACTERS_AT_ONCE = 2**20


def find_files(config: TrainConfig) -> dict[str, list[Path]] | None:
    """The files of each split, sorted by path and all of one kind, or None for a dataset that is not local.

    The first of them that is not empty has been looked at: it has the column of text.

    Raises:
        ValueError: no such file, an unknown extension, files of several kinds, some that name a split and some that do
            not, no such split, no documents, no such column, or a column of something else.
    """
    name = config.dataset
    if name == PYTHON_STDLIB:
        return None
    path = expanded(name, "dataset")
    if not path.exists():
        if path.is_absolute() or path.suffix.lower() in _KINDS:
            raise ValueError(f"dataset is {name!r}, but no such file or folder exists; allowed: {ALLOWED}")
        return None
    files = _of_one_kind(path)
    splits = {"train": files} if path.is_file() else _splits(path.absolute(), files)
    _require_split(config, splits)
    with_text = [file for file in files if file.stat().st_size]
    if not with_text:
        raise ValueError(f"dataset {name!r} is empty; allowed: a dataset with at least one document")
    require_column(config, _first_columns(with_text[0], config.text_column))
    return splits


def require_column(config: TrainConfig, names: Sequence[str]) -> None:
    """Refuse a dataset of which `text_column` is not among the `names` of the columns."""
    column = config.text_column
    if column in names:
        return
    found = f"text_column is {column!r}, but dataset {config.dataset!r} has no such column"
    chats = [name for name in names if name in _CHATS]
    if chats:
        raise ValueError(
            f"{found}, only chats in {' and '.join(map(repr, chats))}, which are not read yet; "
            f"allowed: a column of text; nearest: a column {column!r} with {CHAT_AS_TEXT}"
        )
    raise ValueError(f"{found}; allowed: {', '.join(map(repr, names))}{nearest(column, names)}")


def texts_of_json_lines(file: str, column: str) -> Iterator[str | None]:
    """The text of each line; None where it has no such column, or null there. The other columns may hold anything.

    Raises:
        ValueError: a line is not an object of JSON in UTF-8, or its column holds no text; with the file and the line.
    """
    for number, row in _lines(file):
        yield _text(file, number, row, column)


def _first_columns(file: Path, column: str) -> list[str]:
    """The columns that the file's first lines have, as far as the first text in the one that is wanted."""
    if file.suffix.lower() == ".txt":
        return [TEXT]
    if file.suffix.lower() == ".parquet":
        return _parquet_columns(file)
    columns: dict[str, None] = {}
    for number, row in islice(_lines(str(file)), _FIRST_LINES):
        columns |= dict.fromkeys(row)
        if _text(str(file), number, row, column) is not None:
            break
    return list(columns)


def _parquet_columns(file: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(file).names)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(file)!r} cannot be read ({reason}); allowed: a whole parquet file") from error


def _text(file: str, number: int, row: Mapping[str, Any], column: str) -> str | None:
    text = row.get(column)
    if not isinstance(text, str | None):
        of_text = [name for name, value in row.items() if isinstance(value, str)]
        fix = f"--text_column {of_text[0]}" if of_text else "quotation marks around it"
        if isinstance(text, list | dict):
            fix = CHAT_AS_TEXT
        raise ValueError(
            f"line {number} of {file!r} has a {type(text).__name__} in {column!r}, {json.dumps(text)[:60]}; "
            f"allowed: a column of text; nearest: {fix}"
        )
    if text is not None and not _is_utf8(text):
        raise ValueError(
            f"line {number} of {file!r} has half a surrogate pair in {column!r}, which is no character; "
            "allowed: text that can be written in UTF-8"
        )
    return text


def _lines(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line that is not blank, with its number from 1.

    A line may be as long as a book of books: it is let go as soon as the next form of it is there.
    """
    with open(file, "rb") as lines:
        number = 0
        while line := lines.readline():
            number += 1
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                del line
                if not text:
                    continue
                row = json.loads(text)
            except (ValueError, RecursionError) as error:  # of which both decoders' errors are
                raise ValueError(
                    f"line {number} of {file!r} is not JSON in UTF-8 ({error}); allowed: one object a line"
                ) from None
            del text
            if not isinstance(row, dict):
                raise ValueError(f"line {number} of {file!r} is not an object; allowed: one object a line")
            yield number, row
            del row


def _is_utf8(text: str) -> bool:
    try:
        for start in range(0, len(text), _CHARACTERS_AT_ONCE):
            text[start : start + _CHARACTERS_AT_ONCE].encode()
    except UnicodeEncodeError:
        return False
    return True


def _of_one_kind(path: Path) -> list[Path]:
    if path.is_file():
        found = [path] if path.suffix.lower() in _KINDS else []
    else:
        visible = (
            file
            for file in sorted(path.rglob("*"))
            if not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        found = [file for file in visible if file.suffix.lower() in _KINDS and file.is_file()]
    if not found:
        raise ValueError(f"dataset is {str(path)!r}; allowed: a {', '.join(_KINDS)} file or a folder of them")
    extensions = sorted({file.suffix.lower() for file in found})
    if len(extensions) > 1:
        raise ValueError(
            f"dataset is {str(path)!r}, a folder with {' and '.join(extensions)} files; "
            "allowed: files of one kind; nearest: move each kind into a folder of its own"
        )
    return [file.absolute() for file in found]


def _splits(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """As `load_dataset` names them by files or else by folders: train.jsonl, data/test/0.jsonl.

    Raises:
        ValueError: some names say a split and others none, or two.
    """
    for by_folder in (False, True):
        named = {file: _split_names(file.relative_to(folder), by_folder) for file in files}
        if not any(named.values()):
            continue
        for file, names in named.items():
            if len(names) != 1:
                what = "of no split" if not names else f"of the splits {' and '.join(names)}"
                raise ValueError(
                    f"dataset is {str(folder)!r}, whose files are parted by name, but {file.name!r} is {what}; "
                    "allowed: train, validation or test in the name of each, or of none"
                )
        return {split: [file for file in files if named[file] == [split]] for split in _in_order(named.values())}
    return {"train": list(files)}


def _split_names(file: Path, by_folder: bool) -> list[str]:
    names = file.parts[:-1] if by_folder else (file.name,)
    return [
        split
        for split, words in SPLIT_WORDS.items()
        if any(re.search(rf"(^|[-._ 0-9]){word}([-._ 0-9]|$)", name) for word in words for name in names)
    ]


def _in_order(named: Iterable[Sequence[str]]) -> list[str]:
    there = {split for splits in named for split in splits}
    return [split for split in SPLIT_WORDS if split in there]


def _require_split(config: TrainConfig, splits: Iterable[str]) -> None:
    """Refuse a name that no split has. The rest of the notation, as in "train[:90%]+test", is `datasets`' to read."""
    for part in config.dataset_split.split("+"):
        name = re.match(r"\w+", part.strip())
        if name is not None and name[0] not in (*splits, "all"):
            raise ValueError(
                f"dataset {config.dataset!r} has no split {name[0]!r}; allowed: {', '.join(map(repr, splits))}, "
                f"or a part of one as 'train[:90%]'{nearest(name[0], splits)}"
            )
