"""Metrics in the libraries that people follow their runs with, where the user asks for one: wandb and trackio."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mst_ds.command_line.entry_point import RequestError
from mst_ds.files.whole_file import replace_file
from mst_ds.metrics.records import Value
from mst_ds.metrics.sinks import Sink, Tagged

_PROJECT = "mst_ds"
# The axis that transformers gives its metrics: a run that goes on logs steps once more, which wandb's own cannot be.
_STEP = "train/global_step"


def start_trackers(
    names: Sequence[str], folder: Path, *, rank: int, flags: Mapping[str, Any], goes_on: bool
) -> tuple[Sink, ...]:
    """Start the run in each library, under the name of its folder; on every other rank than 0 nothing is started.

    Args:
        names: "wandb", "trackio"; others are not of this module.
        folder: of the run.
        rank: this process' global rank.
        flags: shown beside the metrics.
        goes_on: it is the run that was started there before.

    Raises:
        RequestError: a library does not start, as for want of an account.
    """
    if rank != 0:
        return ()
    return tuple(_start(name, folder, flags, goes_on) for name in names if name in _TRACKERS)


def _start(name: str, folder: Path, flags: Mapping[str, Any], goes_on: bool) -> Sink:
    try:
        return _TRACKERS[name](folder.absolute(), flags, goes_on)
    except Exception as error:  # of any class of the library's
        raise RequestError(f"report_to is {name!r}, which does not start: {error}") from error


class Wandb(Tagged):
    """A run of wandb, which goes on as the same run."""

    def __init__(self, folder: Path, flags: Mapping[str, Any], goes_on: bool) -> None:
        import wandb

        id_file = folder / "wandb" / "run_id"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", folder.name),
            dir=str(folder),
            id=id_file.read_text(encoding="utf-8") if goes_on and id_file.is_file() else None,
            resume="allow",
            config=dict(flags),
        )
        id_file.parent.mkdir(exist_ok=True)
        replace_file(id_file, self._run.id)
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP, step_sync=True)

    def log_tags(self, step: int, values: Mapping[str, Value]) -> None:
        self._run.log({**values, _STEP: step})

    def close(self) -> None:
        self._run.finish()


class Trackio(Tagged):
    """A run of trackio, which knows a run that goes on by its name."""

    def __init__(self, folder: Path, flags: Mapping[str, Any], goes_on: bool) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=folder.name,
            config=dict(flags),
            resume="allow" if goes_on else "never",
            embed=False,
        )

    def log_tags(self, step: int, values: Mapping[str, Value]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: Mapping[str, Callable[[Path, Mapping[str, Any], bool], Sink]] = {"wandb": Wandb, "trackio": Trackio}
