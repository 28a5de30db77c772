"""The flags that say what becomes of what a run finds: where its metrics are reported; without a library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from mst_ds.command_line.flags import flag

TENSORBOARD = "tensorboard"
# Libraries that a user installs, which are called by their own names.
TRACKERS = ("wandb", "trackio")
_NONE = "none"
_REPORTS = (TENSORBOARD, *TRACKERS, _NONE)


@dataclass
class ResultFlags:
    """Flags of a training run."""

    report_to: str = flag(
        TENSORBOARD,
        "Where metrics go beside metrics.jsonl: tensorboard, wandb, trackio, or several of them; none.",
        nargs="+",
    )

    def __post_init__(self) -> None:
        # Of the command line it is a list of words, of a YAML file and of Python one text.
        words: str | Sequence[str] = self.report_to
        self.report_to = words if isinstance(words, str) else ",".join(words)

    @property
    def reports(self) -> tuple[str, ...]:
        """Each once, without "none"."""
        words = self.report_to.replace(",", " ").split()
        return tuple(dict.fromkeys(word for word in words if word != _NONE))

    def check_results(self) -> None:
        """Check these flags, without network.

        Raises:
            ValueError: one line with what was given and what is allowed.
        """
        words = self.report_to.replace(",", " ").split()
        if not words or not set(words) <= set(_REPORTS) or (_NONE in words and len(set(words)) > 1):
            raise ValueError(
                f"report_to is {self.report_to!r}; allowed: {', '.join(_REPORTS[:-1])}, several of them, or {_NONE}"
            )
        for name in TRACKERS:
            if name in words and find_spec(name) is None:
                raise ValueError(f"report_to is {name!r}, which is not installed: install it with pip install {name}")
