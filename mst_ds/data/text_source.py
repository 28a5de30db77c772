"""Where the documents come from: a shipped name, local files, or the Hugging Face hub."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, ReadInstruction, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError

from mst_ds.config import TrainConfig
from mst_ds.data.row_files import read_row_files
from mst_ds.data.text_files import read_text_files
from mst_ds.dataset_files import ALLOWED, PYTHON_STDLIB, columns_of_file, find_files, first_file
from mst_ds.rows.files import FORMS, form_of
from mst_ds.rows.kinds import AS_CHAT, TEXT, columns_of, require_kind

# Not the library itself, or (encodings) tables written by a program.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
_MIN_STDLIB_BYTES = 2048


def load_documents(config: TrainConfig) -> Dataset:
    """The documents of `config.dataset`, one row each: the columns of their kind (`mst_ds.rows.kinds`) and no others.

    Text is in the one column "text", whatever its column's name is. A .txt file is one document, as is a row of others,
    and the files of a folder follow each other sorted by path. Where their names say so, as train.jsonl and test.jsonl,
    they are splits. Chats are JSON, save those of .parquet, see `read_row_files`. "python_stdlib" is the source of the
    running Python's standard library, without its tests, generated tables and files of less than 2 KiB.

    Raises:
        ValueError: no such dataset or split, an unknown extension, columns of no kind, no documents.
    """
    if config.dataset_name == PYTHON_STDLIB:
        return _read_files(config, {"train": _stdlib_files()}, [TEXT])
    files = find_files(config)
    if files is None:
        documents = _load(config.dataset_name, config.dataset_name, config.dataset_config, split=config.dataset_split)
        return _of_its_kind(documents, config)
    return _read_files(config, files, columns_of_file(config, first_file(files)))


def _read_files(config: TrainConfig, splits: Mapping[str, Sequence[Path]], names: Sequence[str]) -> Dataset:
    """names: of the columns that the first file has."""
    kind = require_kind(config, names)
    columns = columns_of(kind, names, config.text_column)
    form = form_of(next(file for files in splits.values() for file in files))
    if form == ".parquet":
        # load_dataset reads each path as a pattern.
        patterns = {split: [glob.escape(str(file)) for file in files] for split, files in splits.items()}
        read_columns = [name for name in columns if name in names]
        documents = _load(
            config.dataset_name, "parquet", data_files=patterns, split=config.dataset_split, columns=read_columns
        )
        return _of_its_kind(documents, config)
    try:
        read = {
            split: read_row_files(files, kind, columns) if form in FORMS else read_text_files(files)
            for split, files in splits.items()
        }
    except OSError as error:
        raise ValueError(f"dataset {config.dataset_name!r} cannot be loaded ({error}); allowed: {ALLOWED}") from error
    documents = _one_split(config.dataset_name, read, config.dataset_split)
    return _text_only(documents, config) if kind == "text" and form in FORMS else documents


def _one_split(name: str, read: Mapping[str, Dataset], split: str) -> Dataset:
    """`split` as in `load_dataset`: a name, or parts of splits as "train[:90%]"."""
    try:
        spec = "+".join(read) if split == "all" else split
        parts = ReadInstruction.from_spec(spec).to_absolute({each: len(read[each]) for each in read})
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


def _load(name: str, *args: Any, **kwargs: Any) -> Dataset:
    try:
        return load_dataset(*args, **kwargs)
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        # DatasetGenerationError says only that reading failed; its cause says why.
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"dataset {name!r} cannot be loaded ({reason}); allowed: {ALLOWED}") from error


def _of_its_kind(documents: Dataset, config: TrainConfig) -> Dataset:
    kind = require_kind(config, documents.column_names)
    columns = columns_of(kind, documents.column_names, config.text_column)
    documents = documents.select_columns([name for name in columns if name in documents.column_names])
    return _text_only(documents, config) if kind == "text" else documents


def _text_only(documents: Dataset, config: TrainConfig) -> Dataset:
    column = config.text_column
    feature = documents.features[column]
    if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string")):
        raise ValueError(
            f"text_column is {column!r}, but in dataset {config.dataset_name!r} it holds {feature}; "
            f"allowed: a column of text{'' if isinstance(feature, Value) else f'; nearest: {AS_CHAT}'}"
        )
    return documents if column == TEXT else documents.rename_column(column, TEXT)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    files = [file for file in sorted(found) if file.stat().st_size >= _MIN_STDLIB_BYTES and _is_utf8(file)]
    if not files:
        raise ValueError(f"dataset {PYTHON_STDLIB!r}: {root} holds no source files; allowed: {ALLOWED}")
    return files


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
