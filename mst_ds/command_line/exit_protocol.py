"""What a process says when it ends, and how others read it: exit codes, and error lines on standard error.

Ranks say it to launchers, sweeps, schedulers and people. The scripts of `slurm/` speak the same in shell.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# A rank has an error that others may not have.
EXIT_FAILED = 1
# The request cannot run.
EXIT_REFUSED = 2
# EX_TEMPFAIL of sysexits.h: it was asked to stop, and the same command goes on. What a scheduler requeues on.
EXIT_STOPPED = 75
# Of a rank that SIGKILL ended: as Python, as a shell, and as DeepSpeed's launcher tell it.
EXITS_BY_SIGKILL = (-9, 128 + 9, 256 - 9)

TRAIN_COMMAND = "mst-train"
# slurm/rank.sh makes a rank of a task.
_SPEAKERS = (TRAIN_COMMAND, "rank.sh")
_ERROR = re.compile(rf"^(?:{'|'.join(map(re.escape, _SPEAKERS))}): error: (.*)", re.MULTILINE)
_OF_RANK = "rank "
_CONSEQUENCE = "has ended, whose error tells why"


def error_line(command: str, text: str, *, rank: int | None = None) -> str:
    """An error as a command says it. With a `rank` it is of that rank alone, without one every rank has it."""
    return f"{command}: error: {text if rank is None else f'{_OF_RANK}{rank}: {text}'}"


def another_rank_ended(seen_by: str) -> str:
    """The text of a rank that has no error of its own, but saw another one end.

    Args:
        seen_by: what it saw.
    """
    return f"another rank {_CONSEQUENCE} ({seen_by})"


@dataclass(frozen=True)
class SaidError:
    """The text of one `error_line`."""

    text: str

    @property
    def is_of_one_rank(self) -> bool:
        return self.text.startswith(_OF_RANK)

    @property
    def is_consequence(self) -> bool:
        """Whether the error of another rank is the cause."""
        return _CONSEQUENCE in self.text


def said_errors(log: str) -> list[SaidError]:
    """The errors in what the ranks of a run wrote, first to last."""
    return [SaidError(text.strip()) for text in _ERROR.findall(log)]
