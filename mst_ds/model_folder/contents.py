"""The weight files of a model folder or Hugging Face id: those that transformers loads, there and whole, or none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst_ds.adapters import ADAPTER_FILE
from mst_ds.model_folder.quantization import Quantization
from mst_ds.model_folder.tensors import read_headers
from mst_ds.model_shape import raw_model_config, require_no_pointers, shipped_model_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# As transformers names them, in the order in which it takes them.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEXED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_IN_ORDER = (_WHOLE[0], _INDEXED[0], _WHOLE[1], _INDEXED[1])
_ALLOWED = "allowed: model.safetensors, or model.safetensors.index.json with all of its files"

_WEIGHT_ENDINGS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".npz", ".onnx"),
    *(".ot", ".nemo", ".tflite", ".index.json", ".index", ".incomplete", ".partial", ".tmp", ".part", ".crdownload"),
)
# What lies beside weights. A file of any other kind may be weights in a format of its own, or cut off.
_OTHER_ENDINGS = (
    *(".json", ".jsonl", ".txt", ".md", ".rst", ".html", ".pdf", ".py", ".pyc", ".sh", ".ipynb", ".yaml", ".yml"),
    *(".toml", ".cfg", ".csv", ".parquet", ".log", ".lock", ".jinja", ".model", ".tiktoken", ".spm", ".bpe", ".vocab"),
    *(".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"),
)
_MOST_BYTES_OF_TEXT = 2**20


@dataclass(frozen=True)
class Weights:
    """Where a model's weights are, and in what form.

    Args:
        source: the folder or id, as the user gave it.
        files: all of one format, safetensors or torch's.
        headers: every tensor by its name in the files, without memory, in the dtype that it is stored in.
        quantization: how they are quantised, for a model that is dequantised when it loads.
    """

    source: str
    files: tuple[Path, ...]
    headers: Mapping[str, Tensor] = field(repr=False)
    quantization: Quantization | None

    def plain_headers(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Those of the weights as they are loaded, dequantised to `dtype` where they are quantised.

        Raises:
            ValueError: a scale has no weight, or not the size of its blocks.
        """
        if self.quantization is None:
            return self.headers
        try:
            return self.quantization.dequantize(self.headers, dtype)
        except ValueError as error:
            raise ValueError(f"model {self.source!r}: {error}") from None


def find_weights(name_or_path: str) -> Weights | None:
    """The weights of a model; None for a shipped config and for a folder that has no weight file of any kind.

    Of an id on the Hugging Face hub it gets the files onto this machine, as loading the model would.

    Raises:
        ValueError: a file is missing, cut off, a pointer of Git LFS or no weights; two hold the same tensor; there are
            only files of formats that transformers does not load; or there is an adapter beside the weights.
    """
    if shipped_model_config(name_or_path) is not None:
        return None
    fields = raw_model_config(name_or_path)
    folder = Path(name_or_path)
    if folder.is_dir():
        require_no_pointers(folder)
        if (folder / ADAPTER_FILE).is_file():
            raise ValueError(
                f"model folder {name_or_path!r} has an adapter beside the model, {ADAPTER_FILE}; "
                "allowed: a folder of the model alone, with the adapter merged into it or without"
            )
        files = _local_files(folder, fields)
    else:
        files = _hub_files(name_or_path, fields)
    if not files:
        return None
    headers: dict[str, Tensor] = {}
    for file in files:
        own = read_headers(file)
        if twice := sorted(own.keys() & headers.keys()):
            # Of two shardings, say: transformers takes the last, whatever the index says.
            raise ValueError(
                f"the weights of model {name_or_path!r} hold {first_names(twice)} in {file.name} and in another of its "
                "files; allowed: each tensor once"
            )
        headers |= own
    return Weights(name_or_path, tuple(files), headers, Quantization.of(fields))


def _local_files(folder: Path, fields: dict[str, Any]) -> list[Path]:
    explicit = fields.get("transformers_weights")
    for name in [explicit] if isinstance(explicit, str) else _IN_ORDER:
        if not (folder / name).is_file():
            continue
        if not name.endswith(".index.json"):
            return [folder / name]
        files = [folder / shard for shard in _shards(folder / name)]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ValueError(
                f"model folder {str(folder)!r} lacks {len(absent)} of the {len(files)} files that {name} names: "
                f"{first_names(absent)}; allowed: a folder with all of them"
            )
        return files
    if isinstance(explicit, str):
        raise ValueError(
            f"model folder {str(folder)!r} lacks {explicit}, which transformers_weights in its config.json names; "
            "allowed: a folder with it"
        )
    others = list(_other_weights(folder))
    if others:
        raise ValueError(
            f"model folder {str(folder)!r} has no weights that transformers loads, but {first_names(others)}, which "
            f"may be weights, cut off or in another format; {_ALLOWED}, or a folder without weights, to start from "
            "random ones"
        )
    return []


def _other_weights(folder: Path) -> Iterator[str]:
    """Files, and those in folders within, that may be weights of another format or what a writer left unfinished."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.endswith(_WEIGHT_ENDINGS):
            if not path.name.startswith("."):
                names = sorted(file.name for file in path.iterdir())
                yield from (f"{path.name}/{name}" for name in names if name.endswith(_WEIGHT_ENDINGS))
        elif _may_be_weights(path):
            yield path.name
    downloads = folder / ".cache" / "huggingface" / "download"
    yield from sorted(str(file.relative_to(folder)) for file in downloads.glob("**/*.incomplete"))


def _may_be_weights(path: Path) -> bool:
    if path.name.endswith(_WEIGHT_ENDINGS):
        return True
    if path.suffix == "":
        # safetensors writes to .tmpXXXXXX before it renames the file.
        return path.name.startswith(".tmp") or path.stat().st_size > _MOST_BYTES_OF_TEXT
    return not path.name.lower().endswith(_OTHER_ENDINGS)


def _hub_files(name: str, fields: dict[str, Any]) -> list[Path]:
    from transformers.utils.hub import cached_file

    def get(file: str) -> Path | None:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    explicit = fields.get("transformers_weights")
    try:
        if get(ADAPTER_FILE) is not None:
            raise ValueError(f"model {name!r} has an adapter beside the model, {ADAPTER_FILE}; allowed: a model alone")
        for file in [explicit] if isinstance(explicit, str) else _IN_ORDER:
            found = get(file)
            if found is None:
                continue
            files = [get(shard) for shard in _shards(found)] if file.endswith(".index.json") else [found]
            if None in files:
                raise ValueError(f"model {name!r} lacks files that its {file} names; allowed: a model with all of them")
            return [path for path in files if path is not None]
    except OSError as error:
        raise ValueError(f"weights of model {name!r} cannot be had: {' '.join(str(error).split())}") from None
    raise ValueError(f"model {name!r} has no weights that transformers loads; {_ALLOWED}")


def _shards(index: Path) -> list[str]:
    try:
        fields = json.loads(index.read_text(encoding="utf-8"))
        names = sorted({str(name) for name in fields["weight_map"].values()})
        # transformers reads both.
        if names and isinstance(fields["metadata"], dict):
            return names
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass
    raise ValueError(
        f"{index} is no index of weights; allowed: one with metadata and a weight_map, as transformers writes it"
    )


def first_names(names: list[str], most: int = 3) -> str:
    """The first few, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
