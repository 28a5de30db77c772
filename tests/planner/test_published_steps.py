"""Times are held against steps that others have published, each with the kernels and switches that it ran with."""

import re
from pathlib import Path

import pytest

from benchmarks.published import PUBLISHED

PLANNING = Path(__file__).parents[2] / "docs" / "planning.md"


@pytest.mark.parametrize("step", PUBLISHED, ids=lambda step: step.name)
def test_published_steps_are_predicted(step):
    assert 0.7 < step.ratio < 1.3


def test_the_page_on_plans_shows_them():
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", PLANNING.read_text(), re.MULTILINE)
    expected = [
        (step.name, f"{step.seconds:.4g}", f"{step.predicted():.4g}", f"{step.ratio:.2f}") for step in PUBLISHED
    ]
    assert rows == expected
