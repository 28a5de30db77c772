"""Where the text comes from: a shipped name, local files, or the Hugging Face hub."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Value, load_dataset
from datasets.exceptions import DatasetsError

from mst_ds.config import TrainConfig, nearest

PYTHON_STDLIB = "python_stdlib"
TEXT = "text"

_ALLOWED = f"{PYTHON_STDLIB!r}, a .txt, .jsonl or .parquet file or folder of them, or a Hugging Face dataset id"
_READERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".txt": ("text", {"sample_by": "document"}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
# Not the library itself, or (encodings) tables written by a program.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
_MIN_STDLIB_BYTES = 2048


def load_documents(config: TrainConfig) -> Dataset:
    """The documents of `config.dataset`: one row each, in the one column "text".

    A .txt file is one document, a row of a .jsonl or .parquet file is one, and the files of a folder follow
    each other sorted by path. "python_stdlib" is the source of the running Python's standard library, without
    its tests, generated tables and files of less than 2 KiB.

    Raises:
        ValueError: no such dataset or split, an unknown extension, no column of text, no documents.
    """
    name, split = config.dataset, config.dataset_split
    path = Path(name).expanduser()
    if name == PYTHON_STDLIB:
        documents = _read_files(name, _stdlib_files(), ".txt", split)
    elif path.exists():
        files = _local_files(path)
        documents = _read_files(name, files, files[0].suffix.lower(), split)
    elif path.is_absolute() or path.suffix.lower() in _READERS:
        raise ValueError(f"dataset is {name!r}, but no such file or folder exists; allowed: {_ALLOWED}")
    else:
        documents = _load(name, config.dataset, config.dataset_config, split=split)
    return _text_only(documents, config)


def _read_files(name: str, files: Sequence[Path], kind: str, split: str) -> Dataset:
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"dataset {name!r} is empty; allowed: a dataset with at least one document")
    builder, options = _READERS[kind]
    # load_dataset reads each path as a pattern.
    patterns = [glob.escape(str(file)) for file in files]
    return _load(name, builder, data_files=patterns, split=split, **options)


def _load(name: str, *args: Any, **kwargs: Any) -> Dataset:
    try:
        return load_dataset(*args, **kwargs)
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        # DatasetGenerationError says only that reading failed; its cause says why.
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"dataset {name!r} cannot be loaded ({reason}); allowed: {_ALLOWED}") from error


def _text_only(documents: Dataset, config: TrainConfig) -> Dataset:
    column, names = config.text_column, documents.column_names
    if column not in names:
        raise ValueError(
            f"text_column is {column!r}, but dataset {config.dataset!r} has no such column; "
            f"allowed: {', '.join(map(repr, names))}{nearest(column, names)}"
        )
    feature = documents.features[column]
    if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string")):
        raise ValueError(
            f"text_column is {column!r}, but in dataset {config.dataset!r} it holds {feature}; "
            "allowed: a column of text"
        )
    documents = documents.select_columns([column])
    return documents if column == TEXT else documents.rename_column(column, TEXT)


def _local_files(path: Path) -> list[Path]:
    if path.is_file():
        found = [path] if path.suffix.lower() in _READERS else []
    else:
        visible = (
            file
            for file in sorted(path.rglob("*"))
            if not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        found = [file for file in visible if file.suffix.lower() in _READERS and file.is_file()]
    if not found:
        raise ValueError(f"dataset is {str(path)!r}; allowed: a {', '.join(_READERS)} file or a folder of them")
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
