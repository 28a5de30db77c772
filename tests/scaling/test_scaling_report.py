"""From result files alone: the CSV, the report, the plots; and what a result file is."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from sweeps import done, point

from mst_ds.scaling.report import write_report
from mst_ds.scaling.result import (
    FAILED,
    OUT_OF_MEMORY,
    POINTS,
    PREDICTED,
    REFUSED,
    Result,
    read_result,
    read_results,
    write_result,
)
from mst_ds.scaling.runner import point_result

GIB = 2**30


def write(output_dir: Path, *results: Result) -> None:
    for result in results:
        kind = POINTS if result.is_measured else PREDICTED
        write_result(output_dir / kind / f"{result.source}-{result.name}", result)


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    memory = {"planned_bytes": {"forward": GIB, "backward": 2 * GIB}}
    small = done(point(), 1234.5, **memory, measured_bytes={"forward": 2 * GIB, "backward": 3 * GIB})
    environment = {"device": "NVIDIA H100", "python": "3.11", "torch": "2.9"}
    large = done(point(seq_len=4096), 900.0, **memory, measured_bytes={"forward": GIB, "backward": GIB})
    write(
        tmp_path,
        replace(large, status=OUT_OF_MEMORY, tokens_per_second=None, error="rank 0 ran out | of memory"),
        small,
        point_result(point(2), source="measured", status=REFUSED, error="sp_size is 2"),
        done(point(num_gpus=2), 2000.0, environment=environment),
        done(point(num_gpus=8, num_nodes=2), 9e4, source="predicted for H100", steps=None, **memory),
    )
    return tmp_path


def test_the_csv_has_every_point(output_dir: Path) -> None:
    results = write_report(output_dir)
    with (output_dir / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [result.name for result in results]
    assert [(row["source"], row["status"], row["sp_size"], row["seq_len"], row["num_gpus"]) for row in rows] == [
        ("measured", "done", "1", "1024", "1"),
        ("measured", "out of memory", "1", "4096", "1"),
        ("measured", "refused", "2", "1024", "1"),
        ("measured", "done", "1", "1024", "2"),
        ("predicted for H100", "done", "1", "1024", "8"),
    ]
    assert rows[0]["tokens_per_second"] == "1234.5"
    assert [row["device"] for row in rows] == ["", "", "", "NVIDIA H100", ""]
    assert (rows[0]["planned_peak_bytes"], rows[0]["measured_peak_bytes"]) == (str(2 * GIB), str(3 * GIB))
    assert (rows[1]["tokens_per_second"], rows[1]["error"]) == ("", "rank 0 ran out | of memory")
    assert (rows[2]["dp_size"], rows[3]["dp_size"]) == ("", "2")


def test_the_report(output_dir: Path) -> None:
    write_report(output_dir)
    lines = (output_dir / "report.md").read_text(encoding="utf-8").splitlines()
    for line in (
        "Points that ran: 2 done, 1 out of memory, 1 refused. Predicted: 1.",
        "Measured on NVIDIA H100, with python 3.11, torch 2.9: 1.",
        "![against length](plots/against_length.png)",
        "### a, 1 × 1 ranks",
        "| length (tokens/s) | sp 1 | sp 2 |",
        "| 1K | 1,234 | refused |",
        "| 4K | out of memory |  |",
        "| length (GiB) | sp 1 | sp 2 |",
        "| 1K | 3.000 | refused |",
        "### a, 2 × 8 ranks, predicted for H100",
        "| 1K | 2.000 |",
        "| a | more sequences of 1K, sp 1 | 2 | 1 | 1K | 2,000 | 1.62 | 81% |",
        f"| {point().name} | backward | 2.000 | 3.000 | +50.0% | forward +100.0% |",
        f"| {point(seq_len=4096).name} | measured | out of memory | rank 0 ran out \\| of memory |",
    ):
        assert line in lines, line
    assert not any("Strong scaling" in line for line in lines)


def test_the_plots(output_dir: Path) -> None:
    write_report(output_dir)
    for name in ("against_length", "scaling", "planned_against_measured"):
        with Image.open(output_dir / "plots" / f"{name}.png") as picture:
            # More than axes: in each there are the colours of lines.
            assert len(picture.convert("RGB").getcolors(2**24)) > 50
            assert min(picture.size) > 400


def test_without_matplotlib_there_are_no_plots(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_report(output_dir)
    text = (output_dir / "report.md").read_text(encoding="utf-8")
    assert "Plots need matplotlib" in text
    assert "![" not in text
    assert not (output_dir / "plots").exists()


def test_a_sweep_without_results(tmp_path: Path) -> None:
    assert write_report(tmp_path) == []
    assert "Points that ran: none." in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    result = done(point(), 5.0, planned_bytes={"forward": 1}, request={"train": {"max_steps": "3"}})
    assert read_result(tmp_path) is None
    write_result(tmp_path, result)
    assert read_result(tmp_path) == result
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"name": "a"}', "{", "[" * 99999])
def test_a_file_that_is_no_result(tmp_path: Path, text: str) -> None:
    folder = tmp_path / POINTS / "one"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"one/result\.json is not a result \(.*\); allowed: to remove it"):
        read_results(tmp_path)


def test_a_peak_that_was_measured_goes_before_the_planned() -> None:
    planned = done(point(), 1.0, planned_bytes={"forward": 4, "loss": 3})
    assert planned.peak_bytes == 4
    assert replace(planned, measured_bytes={"forward": 1, "loss": 2}).peak_bytes == 2
    assert replace(planned, planned_bytes={}, status=FAILED).peak_bytes is None
