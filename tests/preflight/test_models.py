"""docs/models.md says what the code does, and the architectures of its table train exactly."""

from __future__ import annotations

import os
import signal
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiers import slow_but_for

from mst_ds.preflight import check_model

DOCS = Path(__file__).parents[2] / "docs"
# Relative, in float64; measured: up to 1.2e-14.
GRADIENT_TOLERANCE = 1e-9
PROMISED = (
    "Llama 3.1",
    "Qwen 2",
    "Qwen 3",
    "Qwen 3 MoE",
    "Mistral",
    "Mixtral",
    "Gemma 2",
    "Gemma 3 (text)",
    "Phi 3 (longrope)",
    "OLMo 2",
    "GPT-NeoX",
    "GPT-2",
)
QUICK = ("Llama 3.1", "Qwen 3 MoE")


sys.path.insert(0, str(DOCS))
import architectures  # noqa: E402 - from the folder above
import forked  # noqa: E402
import survey  # noqa: E402
import write_models as writer  # noqa: E402

ARCHITECTURES = {architecture.name: architecture for architecture in architectures.all_architectures()}
NAMED = [name for name, architecture in ARCHITECTURES.items() if architecture.has_name]
# With layers of its own; not a decoder; multimodal. Exact ones are `QUICK`, and Mamba is refused.
SAMPLE = ("minimax", "Mamba", "bert", "gemma3")


@cache
def surveyed(name: str) -> Any:
    return survey.survey(ARCHITECTURES[name])


@cache
def page() -> str:
    return (DOCS / "models.md").read_text(encoding="utf-8")


def section(title: str) -> list[str]:
    return page().split(f"\n## {title}\n")[1].split("\n## ")[0].splitlines()


@cache
def trained() -> dict[str, list[str]]:
    """The cells of each row, by its name."""
    rows = [line for line in section("Trained") if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {name: others for name, *others in cells}


@cache
def refused(title: str) -> dict[str, str]:
    """The reason of each architecture."""
    lines = [line.removeprefix("- ").split(": ", 1) for line in section(title) if line.startswith("- ")]
    return {name: reason for names, reason in lines for name in names.split(", ")}


@pytest.mark.parametrize("name", slow_but_for(QUICK, PROMISED))
def test_promised_architectures_are_exact(name: str) -> None:
    """At sp 1 and 2, with 1, 4 and 16 chunks of a layer, and 1, 4 and 64 of MLP and loss; of architectures that are not
    `QUICK` whole layers, layers in chunks, and the most chunks on shards."""
    row = surveyed(name)
    assert (row.mlp, row.loss, row.packing, row.sharding, row.recompute) == (None,) * 5
    cases = row.cases()
    assert [
        (each.sp_size, each.layer_chunks, each.mlp_chunks, each.loss_chunks)
        for each in (case.settings for case in cases)
    ] == [
        (sp_size, layer_chunks, chunks, chunks)
        for sp_size in (1, 2)
        for layer_chunks, chunks in ((1, 1), (1, 4), (4, 4), (16, 64))
    ]
    tried = cases if name in QUICK else [cases[1], cases[2], cases[7]]
    report = check_model(ARCHITECTURES[name].config(), tried)
    assert [check.case for check in report.checks] == list(tried)
    assert report.is_exact, report.verdict
    for check in report.checks:
        assert check.gradient_error is not None
        assert check.gradient_error <= GRADIENT_TOLERANCE


def test_the_page_has_all_that_is_registered_once() -> None:
    names = [*trained(), *refused("Refused"), *refused("Not decoders of text alone")]
    assert sorted(names) == sorted(ARCHITECTURES)
    assert {architecture.model_type for architecture in ARCHITECTURES.values()} == {*architectures.registered_types()}
    examples = {name: cells[0][1:].split("]")[0] for name, cells in trained().items() if cells[0].startswith("[")}
    assert examples == {name: ARCHITECTURES[name].example for name in trained() if ARCHITECTURES[name].example}


@pytest.mark.parametrize("name", slow_but_for((*QUICK, *SAMPLE), [*NAMED, "minimax", "bert", "gemma3"]))
def test_the_page_says_what_the_code_does(name: str) -> None:
    row = surveyed(name)
    if not row.trains:
        is_decoder = row.kind is not survey.Kind.NOT_A_DECODER
        said_of = refused("Refused" if is_decoder else "Not decoders of text alone")
        assert said_of[name] == writer.reason_of(row)
        return
    said = trained()[name]
    notes = dict(line.split(". ", 1) for line in section("Trained") if line.split(". ")[0].isdecimal())
    reasons = (row.mlp, row.recompute, row.packing, row.sharding)
    for cell, done, reason in zip(said[1:5], ("chunked", "yes", "yes", "yes"), reasons, strict=True):
        if reason is None:
            assert cell == done
        else:
            assert notes[cell.removeprefix("no [").removesuffix("]")] == reason
    assert tuple(cell != "" for cell in said[5:]) == (True, row.sharding is None)


def answer(item: str) -> str:
    if item == "fails":
        raise ValueError("in two\nlines")
    if item == "crashes":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "hangs":
        signal.pause()
    return item.upper()


def test_what_fails_crashes_or_hangs_harms_no_other() -> None:
    outcomes = forked.in_processes(answer, ["fails", "one", "crashes", "hangs", "two"], count=2, limit_s=3.0)
    assert {outcome.item: outcome.result or outcome.failure for outcome in outcomes} == {
        "one": "ONE",
        "two": "TWO",
        "fails": "ValueError: in two lines",
        "crashes": "its process ends with exit code -9",
        "hangs": "it takes longer than 3 s",
    }


def test_a_finding_is_read_as_it_was_written() -> None:
    row = survey.Row(ARCHITECTURES["GPT-J"], mlp="a", packing="b", sharding="c", recompute="d")
    outcome = forked.Outcome(row.architecture, survey.Finding(row, {1: "1e-14"}), None, 1.0)
    assert writer.as_finding(row.architecture, writer.as_record(outcome)) == survey.Finding(row, {1: "1e-14"})
