"""Writes docs/models.md by running the preflight on the table of architectures.py: python docs/write_models.py"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from architectures import ARCHITECTURES, Architecture
from transformers import PreTrainedConfig

from mst_ds.preflight import Case, Check, cases_to_try, check_model
from mst_ds.settings import MstConfig, Settings

PAGE = Path(__file__).with_name("models.md")
# Probing cases are small: what is refused does not depend on numbers above 1.
SEVERAL = 4
# What a refusal begins with: left out, so that models that are refused alike are so with the same words.
_CLASS = re.compile(r"^\w+(ForCausalLM|LMHeadModel)\b")


@dataclass(frozen=True)
class Row:
    """What the preflight says of an architecture. None where it is done, else why not, in the project's words."""

    architecture: Architecture
    mlp: str | None = None
    loss: str | None = None
    packing: str | None = None
    sharding: str | None = None

    @property
    def trains(self) -> bool:
        """Whether it trains in any way."""
        return self.loss is None

    def cases(self) -> list[Case]:
        """Of a preflight's those that it trains with."""
        settled = {"sp_size": self.sharding, "mlp_chunks": self.mlp}
        mst = MstConfig({name: 1 for name, reason in settled.items() if reason is not None})
        return cases_to_try(mst, packed=self.packing is None) if self.trains else []


def survey(architecture: Architecture) -> Row:
    """Find out what is refused of an architecture: first all of it at once, then one by one.

    Raises:
        RuntimeError: something is neither exact nor refused.
    """
    config = architecture.config()
    try:
        if _refusals(config, _case(2, SEVERAL, SEVERAL, True)) == [None]:
            return Row(architecture)
        packing, loss = _refusals(config, _case(1, 1, 1, True), _case(1, 1, 1, False))
        if loss is not None:
            return Row(architecture, mlp=loss, loss=loss, packing=loss, sharding=loss)
        packed = packing is None
        mlp, sharding = _refusals(config, _case(1, SEVERAL, 1, packed), _case(2, 1, 1, packed))
    except ValueError as error:
        reason = _CLASS.sub("The model", " ".join(str(error).split()))
        return Row(architecture, mlp=reason, loss=reason, packing=reason, sharding=reason)
    return Row(architecture, mlp=mlp, packing=packing, sharding=sharding)


def _case(sp_size: int, mlp_chunks: int, loss_chunks: int, packed: bool) -> Case:
    settings = Settings(sp_size=sp_size, mlp_chunks=mlp_chunks, loss_chunks=loss_chunks, recompute=True)
    return Case(settings, packed)


def _checks(config: PreTrainedConfig, cases: Sequence[Case]) -> Sequence[Check]:
    report = check_model(config, cases)
    if any(check.defect is not None for check in report.checks):
        raise RuntimeError(report.verdict)
    return report.checks


def _refusals(config: PreTrainedConfig, *cases: Case) -> list[str | None]:
    return [check.refusal and _CLASS.sub("The model", check.refusal) for check in _checks(config, cases)]


def worst_error(checks: Sequence[Check], sp_size: int) -> float | None:
    """The largest error of the loss or a gradient at a number of ranks; None where nothing was compared."""
    errors = [
        error
        for check in checks
        if check.case.settings.sp_size == sp_size
        for error in (check.loss_error, check.gradient_error)
        if error is not None
    ]
    return max(errors, default=None)


def page(rows: Sequence[Row], errors: Sequence[Mapping[int, float | None]]) -> str:
    """The whole of docs/models.md.

    Args:
        errors: for each row, by sp size, its worst error.
    """
    notes: dict[str, int] = {}

    def cell(done: str, reason: str | None) -> str:
        return done if reason is None else f"no [{notes.setdefault(reason, len(notes) + 1)}]"

    lines = []
    for row, by_sp_size in zip(rows, errors, strict=True):
        cells = [
            row.architecture.name,
            f"[{row.architecture.example}](https://huggingface.co/{row.architecture.example})",
            cell("chunked", row.mlp),
            cell("chunked", row.loss),
            cell("yes", row.packing),
            cell("yes", row.sharding),
            *(_power_of_ten(by_sp_size.get(sp_size)) for sp_size in (1, 2)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    reasons = [f"{number}. {reason}" for reason, number in notes.items()]
    return "\n".join([_HEAD, *lines, "", _REASONS, "", *reasons, ""])


_HEAD = """\
# Models

Written by `docs/write_models.py`, which runs the preflight (`launch/preflight.py`) on each architecture: a model of a
few thousand random parameters with every kind of layer that the architecture has, against transformers' own forward,
loss and backward with eager attention, both in float64. The code has no list of models: for one that is not in this
table the preflight finds out the same.

- MLP, head and loss: worked through in chunks, experts included. A router's loss is part of the comparison.
- packed: several documents in a sequence, each as if it were alone, also across the border of two shards. A model that
  has this has its layers worked through in chunks, too: both need this project's attention. Layers of others are one
  chunk.
- sharded: sequence parallelism (`sp_size` above 1).
- worst error: the relative errors (Frobenius norm) of the loss and of every parameter's gradient are below this, with
  1, 4 and 16 chunks of a layer and 1, 4 and 64 of MLP and loss, without recompute and with, with what it may keep kept,
  on the host too, or computed again, packed where that is done.

| architecture | for example | MLP | head and loss | packed | sharded | worst error, sp 1 | worst error, sp 2 |
|---|---|---|---|---|---|---|---|"""
_REASONS = "What is refused is refused before a run starts, with these words:"


def _power_of_ten(error: float | None) -> str:
    """The next one above, which is the same on another machine."""
    return "" if error is None else f"1e{math.ceil(math.log10(max(error, 1e-16)))}"


def main() -> None:
    rows, errors = [], []
    for architecture in ARCHITECTURES:
        row = survey(architecture)
        checks = _checks(architecture.config(), row.cases()) if row.trains else ()
        rows.append(row)
        errors.append({sp_size: worst_error(checks, sp_size) for sp_size in (1, 2)})
    PAGE.write_text(page(rows, errors), encoding="utf-8")


if __name__ == "__main__":
    main()
