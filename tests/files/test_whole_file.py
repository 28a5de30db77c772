"""A file that cannot be written whole stays as it was, and its name is in the error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mst_ds.files.whole_file import replace_file


def test_a_full_disk_says_of_which_file_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.csv"
    replace_file(file, "before")

    def is_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", is_full)
    with pytest.raises(OSError, match=r"No space left on device: '.*results\.csv'$"):
        replace_file(file, "after")
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
    assert file.read_text() == "before"
