"""Processes beside the test's own: where they can meet."""

from __future__ import annotations

import socket

_held: list[socket.socket] = []


def free_port() -> str:
    """A port that stays this process' to give away: it is bound as long as the process lives, so that no other test
    and no connection gets it before the ranks are there. Who listens with SO_REUSEADDR, as torch's store, still can."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _held.append(holder)
    return str(holder.getsockname()[1])
