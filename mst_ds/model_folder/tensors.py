"""Tensors of a weight file, with their values or without."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

_SAFETENSORS = ".safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_headers(file: Path) -> dict[str, Tensor]:
    """Name, shape and dtype of every tensor, as tensors without memory; values are not read.

    Raises:
        ValueError: the file is cut off or damaged, holds no tensors by name, or a dtype that torch has not.
    """
    if file.suffix != _SAFETENSORS:
        return _load_pickled(file, "meta")
    from safetensors import SafetensorError, safe_open

    headers = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                part = opened.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise ValueError(f"{file} has {name} in {part.get_dtype()}; allowed: {', '.join(_DTYPES)}")
                headers[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"weights {file} are cut off or damaged ({' '.join(str(error).split())}); allowed: the whole file"
        ) from None
    return headers


class StoredTensors(Mapping[str, "Tensor"]):
    """The tensors of weight files, each read when it is asked for. A context manager: files stay open within."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self._files = files
        self._stack = ExitStack()
        self._readers: dict[str, Any] = {}

    def __enter__(self) -> StoredTensors:
        from safetensors import safe_open

        for file in self._files:
            if file.suffix == _SAFETENSORS:
                opened = self._stack.enter_context(safe_open(file, framework="pt"))
                self._readers |= dict.fromkeys(opened.keys(), opened.get_tensor)
            else:
                self._readers |= dict.fromkeys(loaded := _load_pickled(file, "cpu"), loaded.__getitem__)
        return self

    def __exit__(self, *_: object) -> None:
        self._readers.clear()
        self._stack.close()

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._readers[name](name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _load_pickled(file: Path, device: str) -> dict[str, Tensor]:
    """What torch.save wrote: nothing but tensors is unpickled."""
    try:
        loaded = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"weights {file} cannot be read as tensors alone ({str(error).partition(chr(10))[0]}); allowed: the whole "
            "file, as torch.save wrote it"
        ) from None
    if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise ValueError(f"weights {file} are not tensors by name; allowed: a state dict")
    return {str(name): tensor for name, tensor in loaded.items()}
