"""Writes docs/models.md: the preflight on every architecture that transformers registers for causal language modelling.

python docs/write_models.py RESULTS keeps what it finds in the file RESULTS, one JSON object a line, and goes on with
what is not there yet. What is there is not found out again: remove a line, or the file, after a change.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from architectures import Architecture, all_architectures
from forked import Outcome, in_processes
from survey import Finding, Kind, Row, find

PAGE = Path(__file__).with_name("models.md")
_REASONS = ("mlp", "loss", "packing", "sharding", "recompute")


def page(findings: Sequence[Finding]) -> str:
    """The whole of docs/models.md."""
    by_kind: dict[Kind, list[Finding]] = {kind: [] for kind in Kind}
    for finding in findings:
        by_kind[finding.row.kind].append(finding)
    trained, notes = _table([*by_kind[Kind.EXACT], *by_kind[Kind.IN_PART]])
    return "\n".join(
        [
            _HEAD,
            "",
            *_counts(findings),
            "",
            _TRAINED,
            *trained,
            "",
            "What is refused of these:",
            "",
            *(f"{number}. {reason}" for reason, number in notes.items()),
            "",
            _REFUSED,
            "",
            *_by_reason(by_kind[Kind.REFUSED]),
            "",
            _NOT_DECODERS,
            "",
            *_by_reason(by_kind[Kind.NOT_A_DECODER]),
            "",
        ]
    )


def _counts(findings: Sequence[Finding]) -> list[str]:
    """A type with several shapes counts as the worst of them."""
    order = list(Kind)
    kinds: dict[str, Kind] = {}
    for finding in findings:
        model_type, kind = finding.row.architecture.model_type, finding.row.kind
        kinds[model_type] = max(kinds.get(model_type, kind), kind, key=order.index)
    counts = Counter(kinds.values())
    return [
        f"transformers {transformers.__version__} registers {len(kinds)} types for causal language modelling:",
        "",
        "| | types |",
        "|---|---|",
        *(f"| {kind.value} | {counts[kind]} |" for kind in Kind),
    ]


def _table(findings: Iterable[Finding]) -> tuple[list[str], dict[str, int]]:
    """The rows, and the number of each reason in them."""
    notes: dict[str, int] = {}

    def cell(done: str, reason: str | None) -> str:
        return done if reason is None else f"no [{notes.setdefault(reason, len(notes) + 1)}]"

    lines = []
    for finding in findings:
        row = finding.row
        cells = [
            row.architecture.name,
            _example(row.architecture),
            cell("chunked", row.mlp),
            cell("yes", row.recompute),
            cell("yes", row.packing),
            cell("yes", row.sharding),
            *(finding.errors.get(sp_size, "") for sp_size in (1, 2)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines, notes


def _example(architecture: Architecture) -> str:
    name = architecture.example
    return f"`{architecture.model_type}`" if name is None else f"[{name}](https://huggingface.co/{name})"


def _by_reason(findings: Iterable[Finding]) -> list[str]:
    """The reasons that most have first."""
    names: dict[str, list[str]] = {}
    for finding in findings:
        names.setdefault(reason_of(finding.row), []).append(finding.row.architecture.name)
    ordered = sorted(names.items(), key=lambda each: (-len(each[1]), each[0]))
    return [f"- {', '.join(of_reason)}: {reason}" for reason, of_reason in ordered]


def reason_of(row: Row) -> str:
    """Why nothing of an architecture is done, without its type, so that those alike come together."""
    return (row.loss or "").replace(f"model type {row.architecture.model_type!r}", "the model type")


_HEAD = """\
# Models

Written by `docs/write_models.py`, which runs the preflight (`launch/preflight.py`) on every type of model that
transformers registers for causal language modelling: a model of a few thousand random parameters with every kind of
layer that the architecture has, against transformers' own forward, loss and backward with eager attention, both in
float64. The shapes are those of the published model where one is named, else those that transformers' config has by
itself. The code has no list of models: for one that is not in this page the preflight finds out the same."""
_TRAINED = """\
## Trained

- MLP: worked through in chunks, experts included, as head and loss are in all of them. A router's loss is part of the
  comparison.
- recompute: layers are computed again in the backward.
- packed: several documents in a sequence, each as if it were alone, also across the border of two shards. A model that
  has this has its layers worked through in chunks, too: both need this project's attention. Layers of others are one
  chunk.
- sharded: sequence parallelism (`sp_size` above 1).
- worst error: the relative errors (Frobenius norm) of the loss and of every parameter's gradient are below this, with
  1, 4 and 16 chunks of a layer and 1, 4 and 64 of MLP and loss, without recompute and with, with what it may keep kept,
  on the host too, or computed again, packed where that is done. Of architectures that stand here by their type alone,
  without a name, with 4 chunks of each.

| architecture | for example | MLP | recompute | packed | sharded | worst error, sp 1 | worst error, sp 2 |
|---|---|---|---|---|---|---|---|"""
_REFUSED = """\
## Refused

Before a run starts, with these words:"""
_NOT_DECODERS = """\
## Not decoders of text alone

Encoders that transformers registers with a head for language modelling, models of an encoder and a decoder, and models
of more than text. Of the last `mst-train` trains the language model, where transformers has a class for it alone: a
part that is named here, with a row of its own above ([how](finetune.md#the-model)):"""


def as_record(outcome: Outcome[Architecture, Finding]) -> dict[str, Any]:
    """What is kept of an outcome."""
    finding = outcome.result
    if finding is None:
        finding = Finding(Row.refused(outcome.item, f"the preflight fails: {outcome.failure}"), {})
    return {
        "name": outcome.item.name,
        **{name: getattr(finding.row, name) for name in _REASONS},
        "errors": finding.errors,
        "seconds": round(outcome.seconds, 1),
    }


def as_finding(architecture: Architecture, record: Mapping[str, Any]) -> Finding:
    row = Row(architecture, **{name: record[name] for name in _REASONS})
    return Finding(row, {int(sp_size): error for sp_size, error in record["errors"].items()})


def _read(results: Path) -> dict[str, Mapping[str, Any]]:
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def _import_first() -> None:
    """What every process needs, once before it is forked; modeling files are imported as they are needed."""
    from transformers import AutoModelForCausalLM  # noqa: F401

    import mst_ds.patching  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="file of what was found so far; it is made where there is none")
    parser.add_argument("--processes", type=int, default=2, help="architectures at a time (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for each (default: %(default)s)")
    arguments = parser.parse_args()
    architectures, found = all_architectures(), _read(arguments.results)
    missing = [architecture for architecture in architectures if architecture.name not in found]
    _import_first()
    start = time.monotonic()
    with arguments.results.open("a", encoding="utf-8") as file:
        for outcome in in_processes(find, missing, count=arguments.processes, limit_s=arguments.limit):
            record = as_record(outcome)
            file.write(json.dumps(record) + "\n")
            file.flush()
            found[record["name"]] = record
            print(f"{outcome.item.name}: {as_finding(outcome.item, record).row.kind.value}, {outcome.seconds:.0f} s")
    print(f"{len(missing)} of {len(architectures)} architectures in {time.monotonic() - start:.0f} s")
    findings = [as_finding(architecture, found[architecture.name]) for architecture in architectures]
    PAGE.write_text(page(findings), encoding="utf-8")


if __name__ == "__main__":
    main()
