"""Where the text comes from: a shipped name, local files, or the Hugging Face hub."""

from __future__ import annotations

import glob
import os
import re
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, ReadInstruction, Value, concatenate_datasets, load_dataset
from datasets.data_files import SPLIT_KEYWORDS
from datasets.exceptions import DatasetsError

from mst_ds.config import TrainConfig, nearest
from mst_ds.data.json_lines import CHAT_AS_TEXT, first_columns, read_json_lines

PYTHON_STDLIB = "python_stdlib"
TEXT = "text"

_ALLOWED = f"{PYTHON_STDLIB!r}, a .txt, .jsonl or .parquet file or folder of them, or a Hugging Face dataset id"
_KINDS = (".txt", ".jsonl", ".parquet")
_CHATS = {"messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected"}
# Not the library itself, or (encodings) tables written by a program.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
_MIN_STDLIB_BYTES = 2048


def load_documents(config: TrainConfig) -> Dataset:
    """The documents of `config.dataset`: one row each, in the one column "text".

    A .txt file is one document, a row of a .jsonl or .parquet file is one, and the files of a folder follow
    each other sorted by path. Where their names say so, as train.jsonl and test.jsonl, they are splits. Other columns
    are not read. "python_stdlib" is the source of the running Python's standard library, without its tests, generated
    tables and files of less than 2 KiB.

    Raises:
        ValueError: no such dataset or split, an unknown extension, no column of text, no documents.
    """
    name, split = config.dataset, config.dataset_split
    path = Path(name).expanduser()
    if name == PYTHON_STDLIB:
        documents = _read_files(config, {"train": _stdlib_files()}, ".txt")
    elif path.exists():
        files = _local_files(path)
        splits = {"train": files} if path.is_file() else _splits(path.absolute(), files)
        documents = _read_files(config, splits, files[0].suffix.lower())
    elif path.is_absolute() or path.suffix.lower() in _KINDS:
        raise ValueError(f"dataset is {name!r}, but no such file or folder exists; allowed: {_ALLOWED}")
    else:
        documents = _load(name, config.dataset, config.dataset_config, split=split)
    return _text_only(documents, config)


def _read_files(config: TrainConfig, splits: Mapping[str, Sequence[Path]], kind: str) -> Dataset:
    name, column = config.dataset, config.text_column
    with_text = [file for files in splits.values() for file in files if file.stat().st_size]
    if not with_text:
        raise ValueError(f"dataset {name!r} is empty; allowed: a dataset with at least one document")
    if kind == ".jsonl":
        _require_column(config, first_columns(with_text[0]))
        read = {split: read_json_lines(files, column) for split, files in splits.items()}
        return _one_split(name, read, config.dataset_split)
    options: dict[str, Any] = {"sample_by": "document"}
    if kind == ".parquet":
        _require_column(config, _parquet_columns(with_text[0]))
        options = {"columns": [column]}
    # load_dataset reads each path as a pattern.
    patterns = {split: [glob.escape(str(file)) for file in files] for split, files in splits.items()}
    builder = {".txt": "text", ".parquet": "parquet"}[kind]
    return _load(name, builder, data_files=patterns, split=config.dataset_split, **options)


def _parquet_columns(file: Path) -> list[str]:
    try:
        return list(pq.read_schema(file).names)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(file)!r} cannot be read ({reason}); allowed: a whole parquet file") from error


def _one_split(name: str, read: Mapping[str, Dataset], split: str) -> Dataset:
    """`split` as in `load_dataset`: a name, or parts of splits as "train[:90%]"."""
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({each: len(read[each]) for each in read})
    except (ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"dataset {name!r} has no split {split!r} ({reason}); "
            f"allowed: {', '.join(map(repr, read))}, or a part of one"
        ) from error
    documents = concatenate_datasets([read[part.splitname].select(range(part.from_, part.to)) for part in parts])
    if not len(documents):
        raise ValueError(f"dataset {name!r} is empty; allowed: a dataset with at least one document")
    return documents


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
        str(split)
        for split, words in SPLIT_KEYWORDS.items()
        if any(re.search(rf"(^|[-._ 0-9]){word}([-._ 0-9]|$)", name) for word in words for name in names)
    ]


def _in_order(named: Iterable[Sequence[str]]) -> list[str]:
    there = {split for splits in named for split in splits}
    return [str(split) for split in SPLIT_KEYWORDS if str(split) in there]


def _require_column(config: TrainConfig, names: Sequence[str]) -> None:
    column = config.text_column
    if column in names:
        return
    found = f"text_column is {column!r}, but dataset {config.dataset!r} has no such column"
    chats = [name for name in names if name in _CHATS]
    if chats:
        raise ValueError(
            f"{found}, only chats in {' and '.join(map(repr, chats))}, which are not read yet; "
            f"allowed: a column of text; nearest: {CHAT_AS_TEXT} into a column {column!r}"
        )
    raise ValueError(f"{found}; allowed: {', '.join(map(repr, names))}{nearest(column, names)}")


def _load(name: str, *args: Any, **kwargs: Any) -> Dataset:
    try:
        return load_dataset(*args, **kwargs)
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        # DatasetGenerationError says only that reading failed; its cause says why.
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"dataset {name!r} cannot be loaded ({reason}); allowed: {_ALLOWED}") from error


def _text_only(documents: Dataset, config: TrainConfig) -> Dataset:
    column = config.text_column
    _require_column(config, documents.column_names)
    feature = documents.features[column]
    if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string")):
        raise ValueError(
            f"text_column is {column!r}, but in dataset {config.dataset!r} it holds {feature}; "
            f"allowed: a column of text{'' if isinstance(feature, Value) else f'; nearest: {CHAT_AS_TEXT}'}"
        )
    documents = documents.select_columns([column])
    return documents if column == TEXT else documents.rename_column(column, TEXT)


def _local_files(path: Path) -> list[Path]:
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


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    files = [file for file in sorted(found) if file.stat().st_size >= _MIN_STDLIB_BYTES and _is_utf8(file)]
    if not files:
        raise ValueError(f"dataset {PYTHON_STDLIB!r}: {root} holds no source files; allowed: {_ALLOWED}")
    return files


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
