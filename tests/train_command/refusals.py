"""Requests of mst-train that cannot run: folders for them, and what may not happen before they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 264,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 264, "n_positions": 63}


class TooLateError(BaseException):  # no error of a run, at which the command ends its process
    """No ValueError, so that `main` lets it through."""


def too_late(name: str) -> Callable[..., Any]:
    def poisoned(*args: Any, **kwargs: Any) -> Any:
        raise TooLateError(name)

    return poisoned


def only_line(stderr: str) -> str:
    assert stderr.startswith("mst-train: error: ")
    assert stderr.count("\n") == 1, stderr
    assert stderr.endswith("\n")
    return stderr.removeprefix("mst-train: error: ")


def write(path: Path, content: str | dict[str, Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def model_folder(path: Path, config: dict[str, Any]) -> str:
    write(path / "config.json", config)
    write(path / "model.safetensors", "reading this fails")
    return str(path)
