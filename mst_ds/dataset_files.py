"""The files of a local dataset, and whether they can be one: read in a moment, without the libraries of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from mst_ds.config import TrainConfig, nearest
from mst_ds.files.read_file import expanded
from mst_ds.rows.files import FORMS, form_of, rows_of
from mst_ds.rows.json_lines import look_at
from mst_ds.rows.kinds import TEXT, columns_of, kind_of, require_kind
from mst_ds.rows.sources import require_rows_that_mix, sources_of

PYTHON_STDLIB = "python_stdlib"
ALLOWED = (
    f"{PYTHON_STDLIB!r}, a .txt, .jsonl, .json, .csv or .parquet file or folder of them, or a Hugging Face dataset id"
)
SPLIT_WORDS = {
    "train": ["train", "training"],
    "validation": ["validation", "valid", "dev", "val"],
    "test": ["test", "testing", "eval", "evaluation"],
}
"""What says a split in the name of a file or folder, as in `datasets`."""

_KINDS = (".txt", *FORMS, ".parquet")
# What `datasets` writes beside the rows.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_FIRST_ROWS = 1000


def look_at_datasets(config: TrainConfig) -> None:
    """Refuse what `find_files` refuses of any dataset, and local ones whose rows cannot be mixed.

    Raises:
        ValueError: see `sources_of`, `find_files` and `require_rows_that_mix`.
    """
    of_text = []
    for source in sources_of(config):
        files = find_files(source.config)
        if files is not None:
            kind = require_kind(source.config, columns_of_file(source.config, first_file(files)))
            of_text.append((source.name, kind == "text"))
    require_rows_that_mix(of_text)


def first_file(splits: Mapping[str, Sequence[Path]]) -> Path:
    """The first one that is not empty."""
    return next(file for files in splits.values() for file in files if file.stat().st_size)


def find_files(config: TrainConfig) -> dict[str, list[Path]] | None:
    """The files of each split, sorted by path and all of one kind, or None for a dataset that is not local.

    The first of them that is not empty has been looked at: it has the columns of a kind, and the first row is of it.

    Raises:
        ValueError: no such file, an unknown extension, files of several kinds, some that name a split and some that do
            not, no such split, no documents, columns of no kind (see `require_kind`), or a first row of something else.
    """
    name = config.dataset_name
    if name == PYTHON_STDLIB:
        return None
    path = expanded(name, "dataset")
    if not path.exists():
        if path.is_absolute() or form_of(path) in _KINDS:
            raise ValueError(f"dataset is {name!r}, but no such file or folder exists; allowed: {ALLOWED}")
        return None
    files = _of_one_kind(path)
    splits = {"train": files} if path.is_file() else _splits(path.absolute(), files)
    _require_split(config, splits)
    with_text = [file for file in files if file.stat().st_size]
    if not with_text:
        raise _empty(config)
    columns_of_file(config, with_text[0])
    return splits


def columns_of_file(config: TrainConfig, file: Path) -> list[str]:
    """The columns of a file that say of which kind its rows are; of rows that are text the first are looked at.

    Raises:
        ValueError: see `find_files`.
    """
    if form_of(file) not in FORMS:
        names = [TEXT] if form_of(file) == ".txt" else _parquet_columns(file)
        require_kind(config, names)
        return names
    filled: dict[str, None] = {}
    every: dict[str, None] = {}
    has_rows = False
    for where, row in islice(rows_of(file), _FIRST_ROWS):
        has_rows = True
        every |= dict.fromkeys(row)
        filled |= dict.fromkeys(name for name, value in row.items() if value is not None)
        if (kind := kind_of(config, filled)) is not None:
            look_at(row, kind, columns_of(kind, filled, config.text_column), where)
            break
    if not has_rows:
        raise _empty(config)
    names = list(filled if kind_of(config, filled) else every)
    require_kind(config, names)
    return names


def _empty(config: TrainConfig) -> ValueError:
    return ValueError(f"dataset {config.dataset_name!r} is empty; allowed: a dataset with at least one document")


def _parquet_columns(file: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(file).names)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(file)!r} cannot be read ({reason}); allowed: a whole parquet file") from error


def _of_one_kind(path: Path) -> list[Path]:
    if path.is_file():
        found = [path] if form_of(path) in _KINDS else []
    else:
        visible = (
            file
            for file in sorted(path.rglob("*"))
            if not any(part.startswith(".") for part in file.relative_to(path).parts) and file.name not in _DESCRIPTIONS
        )
        found = [file for file in visible if form_of(file) in _KINDS and file.is_file()]
    if not found:
        raise ValueError(f"dataset is {str(path)!r}; allowed: a {', '.join(_KINDS)} file or a folder of them")
    extensions = sorted({form_of(file) for file in found})
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
                f"dataset {config.dataset_name!r} has no split {name[0]!r}; allowed: {', '.join(map(repr, splits))}, "
                f"or a part of one as 'train[:90%]'{nearest(name[0], splits)}"
            )
