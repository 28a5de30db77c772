"""The session for a GPU, at small sizes on the CPU: all sections run, and none stops the others."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT

from benchmarks.gpu import lengths
from benchmarks.gpu.packed import random_lengths
from benchmarks.gpu.scale import GPU, TINY
from benchmarks.gpu.sections import Context, Section, run_sections
from benchmarks.gpu.session import BUDGET_SECONDS, SECTIONS
from benchmarks.write_report import page

CONTEXT = Context(torch.device("cpu"), TINY)
# Of this project's dependencies what a bare machine lacks, and no wheel is carried for.
NOT_THERE = ("datasets", "pyarrow", "pandas", "tensorboard", "matplotlib")
# What a machine with torch and transformers may lack, too: DeepSpeed, and what only it needs.
OPTIONAL = (
    "deepspeed",
    "pydantic",
    "hjson",
    "msgpack",
    "ninja",
    "cpuinfo",
    "einops",
    "liger_kernel",
    "flash_attn",
    "peft",
)
WITHOUT = """
import importlib.machinery, runpy, sys
class Installed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Installed
sys.argv[1:] = {arguments!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def run_script(*arguments: str, without: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    script = WITHOUT.format(
        names=without, arguments=list(arguments), script=str(ROOT / "benchmarks" / "gpu_session.py")
    )
    # The project is found by the script's own place alone, in another folder too.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Output and JSON of a session on the CPU."""
    folder = tmp_path_factory.mktemp("session")
    done = run_script("--output", "found.json", without=NOT_THERE, folder=folder)
    assert done.returncode == 0, done.stdout
    return done.stdout, json.loads((folder / "found.json").read_text(encoding="utf-8"))


def test_every_section_runs_on_the_cpu(session):
    output, document = session
    assert "small sizes on the CPU" in output
    assert document["settings"]["tiny"] is True
    assert {name: (each["status"], each["error"]) for name, each in document["sections"].items()} == {
        section.name: ("done", None) for section in SECTIONS
    }
    for section in SECTIONS:
        outcome = document["sections"][section.name]
        assert set(section.keys) <= outcome["results"].keys(), section.name
        assert outcome["seconds"] < outcome["deadline_seconds"]
        assert section.name in output


def test_what_the_sections_find_on_the_cpu(session):
    _, document = session
    found = {name: each["results"] for name, each in document["sections"].items()}
    assert found["device"]["where"]["torch"] == torch.__version__
    forms = {record["form"]: record for record in found["probes"]["products"]}
    assert forms["fp32 copies"]["error_to_fp64"] < 1e-6 < 1e-4 < forms["16-bit product"]["error_to_fp64"]
    assert "error" in next(record for record in found["probes"]["kernels"] if record["kernel"] == "cudnn")
    compared = [record for record in found["exactness"]["cases"] if "ratio" in record]
    assert len(compared) == 16
    assert all(record["finite"] and record["within"] for record in compared)
    for record in found["memory"]["records"]:
        assert set(record["phases"]) == {"initialisation", "forward", "loss", "backward"}
    names = {"recompute", "Liger + recompute", "DeepSpeed ALST", "mst_ds", "mst_ds, planned"}
    for name in ("speed", "long step"):
        assert {record["contender"] for record in found[name]["records"]} == names
        for record in found[name]["records"]:
            assert record.get("seconds") or "not installed" in record["error"]
    found_lengths = {each["contender"]: each["longest"] for each in found["longest"]["records"] if "longest" in each}
    assert found_lengths["mst_ds"] > found_lengths["recompute"] > 0
    assert [sum(lengths) for lengths in found["packed"]["documents"].values()] == [TINY.packed_length] * 3
    assert all(record["seconds"] >= record["host_seconds"] > 0 for record in found["packed"]["records"])
    assert len(found["offload"]["records"]) == 4
    assert all(found["profile"]["kinds"][kind] > 0 for kind in ("matrices", "attention", "passes"))


def test_the_file_has_a_table_in_the_report(session):
    _, document = session
    text = page({"gpu": document})
    for section in SECTIONS:
        assert f"| {section.name} | done | " in text


def test_unfinished_sections_are_shown(session):
    _, document = session
    for section in SECTIONS:
        results = list(document["sections"][section.name]["results"].items())
        for count in range(len(results) + 1):
            assert all(isinstance(line, str) for line in section.lines(dict(results[:count])))
        assert section.lines(dict(results))


def test_neither_deepspeed_nor_liger_is_needed(tmp_path):
    sections = ("--sections", "device", "speed", "--output", "found.json", "--tiny")
    done = run_script(*sections, without=NOT_THERE + OPTIONAL, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["sections"]
    assert [each["status"] for each in found.values()] == ["done", "done"]
    errors = {each["contender"]: each.get("error") for each in found["speed"]["results"]["records"]}
    assert errors["DeepSpeed ALST"] == "deepspeed is not installed"
    assert errors["Liger + recompute"] == "liger_kernel is not installed"
    assert errors["mst_ds"] is errors["recompute"] is None


def section(name, run, seconds):
    return Section(name, seconds, run, ("key",), lambda results: [])


def test_a_section_that_raises_or_passes_its_deadline_does_not_stop_the_rest():
    def fail(context, results):
        results["key"] = 1
        raise ValueError("this is wrong")

    def run_out(context, results):
        raise torch.OutOfMemoryError("no memory")

    def never_end(context, results):
        results["key"] = 2
        while True:
            try:
                sum(range(1000))
            except Exception:  # code that goes on after any error must end, too
                continue

    def end(context, results):
        results["key"] = 3

    runs = {"raises": fail, "runs out": run_out, "never ends": never_end, "ends": end}
    # The last one's seconds are kept for it, so that the third can have six at most.
    sections = [section(name, run, 60.0 if run is end else 0.0) for name, run in runs.items()]
    written = []
    outcomes = run_sections(sections, CONTEXT, 66.0, lambda found: written.append(list(found)))
    assert {name: (each.status, each.results) for name, each in outcomes.items()} == {
        "raises": ("failed", {"key": 1}),
        "runs out": ("out of memory", {}),
        "never ends": ("past its deadline", {"key": 2}),
        "ends": ("done", {"key": 3}),
    }
    assert outcomes["raises"].error.endswith("ValueError: this is wrong")
    assert written == [list(outcomes)[:count] for count in range(1, 5)]


def test_sections_share_the_budget(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.sections.time", SimpleNamespace(monotonic=lambda: 0.0))  # they take no time
    sections = [section(name, lambda context, results: None, seconds) for name, seconds in (("a", 100), ("b", 50))]
    whole = run_sections(sections, CONTEXT, 200.0, lambda found: None)
    # What is left over is for whoever needs it.
    assert [each.deadline_seconds for each in whole.values()] == [150, 200]
    short = run_sections(sections, CONTEXT, 60.0, lambda found: None)
    assert [each.deadline_seconds for each in short.values()] == [60, 60]
    none = run_sections(sections, CONTEXT, 0.5, lambda found: None)
    assert {each.status for each in none.values()} == {"not started"}


def test_the_sections_fit_into_the_budget():
    assert sum(section.seconds for section in SECTIONS) <= BUDGET_SECONDS <= 560
    assert sum(GPU.exact_documents) == GPU.exact_length
    assert sum(TINY.exact_documents) == TINY.exact_length


def test_lengths_are_extrapolated_along_a_line():
    peaks = [(length, 2**30 + 2**20 * length) for length in (1250, 2000, 4000, 5000)]
    found = lengths.extrapolate([(1249, 2**34), *peaks])
    assert found["bytes_per_token"] == pytest.approx(2**20)
    assert found["fixed_bytes"] == pytest.approx(2**30)
    assert found["extrapolated_longest_80_gib"] == 79 * 1024
    assert lengths.extrapolate(peaks[:1]) == {}
    assert lengths.extrapolate([(1, 5), (2, 5)])["extrapolated_longest_80_gib"] is None


def test_documents_of_random_lengths():
    first, second = (random_lengths(1000, 64, seed) for seed in (1, 2))
    assert sum(first) == sum(second) == 1000
    assert len(first) == len(second) == 64
    assert min(first) > 0
    assert first != second
