"""docs/models.md says what the code does, and the architectures of its table train exactly."""

from __future__ import annotations

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
import write_models as writer  # noqa: E402 - from the folder above

ARCHITECTURES = {architecture.name: architecture for architecture in writer.ARCHITECTURES}


@cache
def survey(name: str) -> Any:
    return writer.survey(ARCHITECTURES[name])


@cache
def page() -> list[str]:
    return (DOCS / "models.md").read_text(encoding="utf-8").splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name", slow_but_for(QUICK, PROMISED))
def test_promised_architectures_are_exact(name: str) -> None:
    """At sp 1 and 2, with 1, 4 and 16 chunks of a layer, and 1, 4 and 64 of MLP and loss; of architectures that are not
    `QUICK` whole layers, layers in chunks, and the most chunks on shards."""
    row = survey(name)
    assert (row.mlp, row.loss, row.packing, row.sharding) == (None,) * 4
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


def test_the_page_has_the_rows_of_the_table() -> None:
    head = next(index for index, line in enumerate(page()) if line.startswith("|---"))
    rows = [cells(line) for line in page()[head + 1 :] if line.startswith("|")]
    assert [row[0] for row in rows] == list(ARCHITECTURES)
    assert [row[1][1:].split("]")[0] for row in rows] == [architecture.example for architecture in writer.ARCHITECTURES]


@pytest.mark.parametrize("name", slow_but_for(QUICK, ARCHITECTURES))
def test_the_page_says_what_the_code_does(name: str) -> None:
    row = survey(name)
    (said,) = (cells(line) for line in page() if line.startswith(f"| {name} |"))
    notes = dict(line.split(". ", 1) for line in page() if line.split(". ")[0].isdecimal())
    for cell, done, reason in zip(
        said[2:6],
        ("chunked", "chunked", "yes", "yes"),
        (row.mlp, row.loss, row.packing, row.sharding),
        strict=True,
    ):
        if reason is None:
            assert cell == done
        else:
            assert notes[cell.removeprefix("no [").removesuffix("]")] == reason
    has_errors = (row.trains, row.trains and row.sharding is None)
    assert tuple(cell != "" for cell in said[6:]) == has_errors
