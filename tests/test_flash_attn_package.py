"""Which installed packages are FlashAttention 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mst_ds.flash_attn_package import flash_attn_2_version

FA2 = ("flash_attn/__init__.py", "flash_attn/flash_attn_interface.py")
FA4 = ("flash_attn/cute/__init__.py",)


@pytest.mark.parametrize(
    ("packages", "files", "expected"),
    [
        ({}, (), None),
        ({"flash_attn": "2.8.3"}, FA2, "2.8.3"),
        ({"flash_attn_4": "4.0.0b5"}, FA4, None),
        ({"flash_attn": "2.8.3", "flash_attn_4": "4.0.0b5"}, (*FA2, *FA4), "2.8.3"),
        ({"flash_attn": "4.0.0"}, FA2, None),
        # Uninstalled in part: what is known of it is still there, its files are not.
        ({"flash_attn": "2.8.3"}, FA4, None),
        ({"flash_attn": "2.8.3"}, (), None),
    ],
    ids=["none", "2", "4", "both", "later", "a namespace", "no files"],
)
def test_only_version_2_is_taken(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    packages: dict[str, str],
    files: Sequence[str],
    expected: str | None,
) -> None:
    for name, version in packages.items():
        metadata = tmp_path / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    found = flash_attn_2_version()
    sys.modules.pop("flash_attn", None)  # find_spec imports what a module is in
    assert found == expected
