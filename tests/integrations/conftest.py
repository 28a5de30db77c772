from __future__ import annotations

from collections.abc import Iterator

import pytest
from left_behind import nothing_left_behind


@pytest.fixture(autouse=True)
def process_of_a_test() -> Iterator[None]:
    with nothing_left_behind():
        yield
