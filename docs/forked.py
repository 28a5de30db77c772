"""Runs a function on many items, each in a process of its own with a time limit."""

from __future__ import annotations

import faulthandler
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# What is imported is there after a fork; an import of torch and transformers takes longer than many an item.
_CONTEXT = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """What became of an item.

    result: None where there is none; failure then says why not.
    """

    item: Item
    result: Result | None
    failure: str | None
    seconds: float


@dataclass
class _Running(Generic[Item]):
    item: Item
    process: BaseProcess
    connection: Connection
    start: float
    is_again: bool


def in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], *, count: int, limit_s: float
) -> Iterator[Outcome[Item, Result]]:
    """Results as they come, of `count` processes at a time.

    A process that fails or takes longer than `limit_s` gives a failure, and harms no other. One that ends without an
    answer, such as by a crash of the interpreter, is started once more, and then gives a failure.
    """
    waiting = iter(items)
    running: dict[Connection, _Running[Item]] = {}
    try:
        while True:
            while len(running) < count and (item := next(waiting, None)) is not None:
                started = _start(function, item)
                running[started.connection] = started
            if not running:
                return
            first_deadline = min(each.start for each in running.values()) + limit_s
            ready = {*wait(list(running), timeout=max(0.0, first_deadline - time.monotonic()))}
            for connection, each in list(running.items()):
                if connection in ready or time.monotonic() - each.start >= limit_s:
                    del running[connection]
                    outcome = _outcome(each, limit_s, has_answered=connection in ready)
                    if outcome is None:
                        again = _start(function, each.item, is_again=True)
                        running[again.connection] = again
                    else:
                        yield outcome
    finally:
        for each in running.values():
            _end(each)


def _start(function: Callable[[Item], Result], item: Item, *, is_again: bool = False) -> _Running[Item]:
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_answer, args=(theirs, function, item))
    process.start()
    theirs.close()
    return _Running(item, process, ours, time.monotonic(), is_again)


def _answer(connection: Connection, function: Callable[[Item], Result], item: Item) -> None:
    faulthandler.enable()
    try:
        connection.send((function(item), None))
    except Exception as error:
        connection.send((None, f"{type(error).__name__}: {' '.join(str(error).split())}"))


def _outcome(each: _Running[Item], limit_s: float, *, has_answered: bool) -> Outcome[Item, Result] | None:
    """None: to be started once more."""
    result, failure = None, f"it takes longer than {limit_s:.0f} s"
    if has_answered:
        try:
            result, failure = each.connection.recv()
        except EOFError:
            each.process.join()
            failure = f"its process ends with exit code {each.process.exitcode}"
            if not each.is_again:
                each.connection.close()
                return None
    _end(each)
    return Outcome(each.item, result, failure, time.monotonic() - each.start)


def _end(each: _Running[Item]) -> None:
    each.process.kill()
    each.process.join()
    each.connection.close()
