"""What every command does around its work: its streams, and one line for what cannot run."""

from __future__ import annotations

import contextlib
import io
import locale
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mst_ds.command_line.exit_protocol import EXIT_REFUSED, error_line

if TYPE_CHECKING:
    from rich.console import Console

# What a request, a file or the machine may raise by itself. Of our own mistakes TypeError, KeyError and the like are
# none of these, and show their traceback.
REQUEST_ERRORS = (ValueError, OSError, RecursionError, OverflowError)
_LONGEST_MESSAGE = 1500
# Narrower tables than this rich cannot draw.
_LEAST_COLUMNS = 40


class RequestError(ValueError):
    """A request that turns out not to be possible when processes have met already: one line, no traceback."""


def run_command(name: str, main: Callable[[Sequence[str]], int]) -> int:
    """Call `main` with the process's arguments, in UTF-8 and with streams that can be written to.

    Standard output that is full, or was closed by its reader, ends the command: what it says is its result.

    Args:
        name: of the command, in front of its errors.
        main: returns the exit code.
    """
    _run_in_utf8()
    _replace_closed_streams()
    # On some CPUs it misses, as soon as it is imported, a kernel for 4 bits, which nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sys.stdout = _Named(sys.stdout)
    code = 0
    try:
        try:
            code = main(sys.argv[1:])
        except SystemExit:  # of argparse, after its help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except OSError as error:
        # Of files `main` has spoken already: this is the stream.
        _write_nowhere(sys.stdout)
        if code != EXIT_REFUSED:
            refuse(name, error)
        return EXIT_REFUSED
    return code


def run_on_without_output() -> None:
    """From here on standard output and error may end: a run of days does not end with its terminal."""
    sys.stdout, sys.stderr = _Lasting(sys.stdout), _Lasting(sys.stderr)


def refuse(name: str, error: BaseException) -> int:
    """Say in one line on standard error what the command `name` cannot do; returns its exit code.

    A reader of standard output that has seen enough, such as `head`, is no error to speak of.
    """
    if isinstance(error, BrokenPipeError):
        _write_nowhere(sys.stdout)
        return EXIT_REFUSED
    say(error_line(name, one_line(error)))
    return EXIT_REFUSED


def say(line: str) -> None:
    """Print a line on standard error, where there is one."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _write_nowhere(sys.stderr)


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks, and its name where the text alone would not tell."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    elif isinstance(error, RecursionError):
        text = f"something in the request is nested too deeply ({text})"
    elif not isinstance(error, ValueError) or not text:
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]} ..."


def console() -> Console:
    """Of rich, for tables, at least as wide as it can draw them."""
    from rich.console import Console

    class Passing(Console):
        def on_broken_pipe(self) -> None:
            raise  # rich's own would end the process with the exit code 1  # noqa: PLE0704

    found = Passing()
    found.width = max(found.width, _LEAST_COLUMNS)
    return found


def _run_in_utf8() -> None:
    """Start again in Python's UTF-8 mode where text would be read otherwise: libraries read files of their own so."""
    if not sys.flags.utf8_mode and locale.getpreferredencoding(False).lower().replace("-", "") != "utf8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _replace_closed_streams() -> None:
    # The lowest free number is the stream's own: no file that is opened later will be written to by mistake.
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _write_nowhere(stream: Any) -> None:
    """What is still in the stream's buffer would be an error again when the process ends."""
    try:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
    except (OSError, io.UnsupportedOperation, ValueError):
        return


class _Around:
    """A stream around another, which has what this one does not change."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Named(_Around):
    """Standard output, with its name in its errors: a disk that is full does not say of which file."""

    def write(self, text: str) -> int:
        with self._naming():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._naming():
            self._stream.flush()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from error


class _Lasting(_Around):
    """A stream that goes on into nothing when it cannot be written to any more."""

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            _write_nowhere(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _write_nowhere(self._stream)
