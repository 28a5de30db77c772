"""The two tiers: what `make test` runs for every change, and what only `make test-slow` does, marked `slow`.

The first has every kind of behaviour once. The second repeats that at length: runs by DeepSpeed's launcher, kills and
other meshes, and most cases of grids that are one proof many times.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but_for(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases of a parameter, those that are not `quick` marked slow."""
    cases = list(cases)
    assert all(case in cases for case in quick), "a quick case is missing"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
