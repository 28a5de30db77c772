"""What the preflight says of an architecture, found in a process of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from architectures import Architecture
from transformers import PreTrainedConfig

from mst_ds.preflight import Case, Check, cases_to_try, check_model
from mst_ds.settings import KNOBS, MstConfig, Settings

# Probing cases are small: what is refused does not depend on numbers above 1.
SEVERAL = 4
# What a refusal begins with: left out, so that models that are refused alike are so with the same words.
_CLASS = re.compile(r"^\w+(ForCausalLM|LMHeadModel|ModelWithLMHead|WithLMHeadModel)\b")
_NOT_A_DECODER = re.compile("is not a decoder;|is multimodal[;,]")
_RANKS = (1, 2)


class Kind(Enum):
    """What becomes of an architecture, in the order of the page."""

    EXACT = "exact, packed and sharded"
    IN_PART = "exact in part"
    REFUSED = "refused"
    NOT_A_DECODER = "not a decoder of text alone"


@dataclass(frozen=True)
class Row:
    """What the preflight says of an architecture. None where it is done, else why not, in the project's words."""

    architecture: Architecture
    mlp: str | None = None
    loss: str | None = None
    packing: str | None = None
    sharding: str | None = None
    recompute: str | None = None

    @classmethod
    def refused(cls, architecture: Architecture, reason: str) -> Row:
        return cls(architecture, reason, reason, reason, reason, reason)

    @property
    def trains(self) -> bool:
        """Whether it trains in any way."""
        return self.loss is None

    @property
    def kind(self) -> Kind:
        if self.loss is not None:
            return Kind.NOT_A_DECODER if _NOT_A_DECODER.search(self.loss) else Kind.REFUSED
        return Kind.EXACT if (self.packing, self.sharding) == (None, None) else Kind.IN_PART

    def cases(self) -> list[Case]:
        """Of a preflight's those that it trains with."""
        reasons = {"sp_size": self.sharding, "mlp_chunks": self.mlp, "recompute": self.recompute}
        mst = MstConfig({name: KNOBS[name].off for name, reason in reasons.items() if reason is not None})
        return cases_to_try(mst, packed=self.packing is None) if self.trains else []

    def few_cases(self) -> list[Case]:
        """For each number of ranks one with few chunks of all that is chunked: many cost most of a preflight's time."""
        few = [case for case in self.cases() if case.settings.loss_chunks == SEVERAL]
        return list({case.settings.sp_size: case for case in few}.values())


@dataclass(frozen=True)
class Finding:
    """A row with its errors: by the number of ranks, as a power of ten; none where nothing was compared."""

    row: Row
    errors: Mapping[int, str]


def find(architecture: Architecture) -> Finding:
    """Survey an architecture, and compare it in the cases that it trains with: all of them where it has a name.

    What is neither exact nor refused is refused here, with the words of the defect.
    """
    try:
        row = survey(architecture)
        cases = row.cases() if architecture.has_name else row.few_cases()
        checks = checks_of(architecture.config(), cases) if row.trains else ()
    except RuntimeError as error:
        return Finding(Row.refused(architecture, f"not exact: {_CLASS.sub('the model', str(error))}"), {})
    errors = {sp_size: worst_error(checks, sp_size) for sp_size in _RANKS}
    return Finding(row, {sp_size: power_of_ten(error) for sp_size, error in errors.items() if error is not None})


def survey(architecture: Architecture) -> Row:
    """Find out what is refused of an architecture: first all of it at once, then one by one.

    Raises:
        RuntimeError: something is neither exact nor refused.
    """
    try:
        config = architecture.config()
    except Exception as error:  # whatever a config's class raises
        return Row.refused(architecture, f"transformers cannot build its config: {' '.join(str(error).split())}")
    try:
        if _refusals(config, _case(2, SEVERAL, SEVERAL, packed=True)) == [None]:
            return Row(architecture)
        packing, loss = _refusals(config, _case(1, 1, 1, packed=True), _case(1, 1, 1, packed=False))
        recompute = None
        if loss is not None:
            recompute = loss
            cases = (_case(1, 1, 1, packed=packed, recompute=False) for packed in (True, False))
            packing, loss = _refusals(config, *cases)
        if loss is not None:
            return Row.refused(architecture, loss)
        settled: dict[str, Any] = {"packed": packing is None, "recompute": recompute is None}
        mlp, sharding = _refusals(config, _case(1, SEVERAL, 1, **settled), _case(2, 1, 1, **settled))
    except ValueError as error:
        return Row.refused(architecture, _CLASS.sub("The model", " ".join(str(error).split())))
    return Row(architecture, mlp, None, packing, sharding, recompute)


def checks_of(config: PreTrainedConfig, cases: Sequence[Case]) -> Sequence[Check]:
    """Raises:
    RuntimeError: something is neither exact nor refused.
    """
    report = check_model(config, cases)
    if any(check.defect is not None for check in report.checks):
        raise RuntimeError(report.verdict)
    return report.checks


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


def power_of_ten(error: float) -> str:
    """The next one above, which is the same on another machine."""
    return f"1e{math.ceil(math.log10(max(error, 1e-16)))}"


def _case(sp_size: int, mlp_chunks: int, loss_chunks: int, *, packed: bool, recompute: bool = True) -> Case:
    settings = Settings(sp_size=sp_size, mlp_chunks=mlp_chunks, loss_chunks=loss_chunks, recompute=recompute)
    return Case(settings, packed)


def _refusals(config: PreTrainedConfig, *cases: Case) -> list[str | None]:
    return [check.refusal and _CLASS.sub("The model", check.refusal) for check in checks_of(config, cases)]
