"""Compares a model of the user's architecture with itself under a plan, and refuses what is not exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mst_ds.geometry import ceil_divide
from mst_ds.model_shape import ModelShape
from mst_ds.preflight.cases import Case, case_of_run
from mst_ds.preflight.compare import Outcome, run_plain, run_planned
from mst_ds.preflight.culprit import find_culprit
from mst_ds.preflight.errors import is_exact
from mst_ds.preflight.float64 import default_float64
from mst_ds.preflight.sequences import Documents
from mst_ds.preflight.shrink import random_fields
from mst_ds.preflight.small_model import build_small_model
from mst_ds.structure import has_whole_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from mst_ds.settings import Settings

_MIN_SEQ_LEN = 41
_BATCH_SIZE = 2  # rows that `Documents` makes


@dataclass(frozen=True)
class Check:
    """One case, compared.

    Args:
        loss_error: the relative difference of the losses. None, as all errors, where nothing ran.
        gradient_error: the largest relative error (Frobenius norm) of a parameter's gradient.
        parameter: whose gradient that is.
        refusal: why this project does not train the model so, in its own words; None where it does.
        defect: what differs, in one line; None where all is exact, or refused.
    """

    case: Case
    loss_error: float | None = None
    gradient_error: float | None = None
    parameter: str | None = None
    refusal: str | None = None
    defect: str | None = None

    @property
    def is_exact(self) -> bool:
        return self.refusal is None and self.defect is None


@dataclass(frozen=True)
class Report:
    """What a preflight found.

    Args:
        model: the model's class.
        parameters, layers: of the small model that was compared.
        switched_off: config fields that were set to 0 to compare, dropouts mostly: no two runs draw the same numbers.
    """

    model: str
    parameters: int
    layers: int
    switched_off: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def is_exact(self) -> bool:
        return all(check.is_exact for check in self.checks)

    @property
    def verdict(self) -> str:
        """One line: exact, or the first thing that is not."""
        for check in self.checks:
            if check.defect is not None:
                return f"{self.model} is not exact: {check.defect}, at {check.case}"
        for check in self.checks:
            if check.refusal is not None:
                return f"{self.model} is refused at {check.case}: {check.refusal}"
        worst = max(max(check.loss_error or 0.0, check.gradient_error or 0.0) for check in self.checks)
        return f"{self.model} is exact: loss and every gradient within {worst:.1e} of transformers'"


def check_model(config: PreTrainedConfig, cases: Sequence[Case]) -> Report:
    """Compare loss and every gradient of a small model of `config`'s architecture with transformers', in float64.

    The truth is the plain model with eager attention on each document alone. On the CPU; a sequence group is simulated.

    Args:
        config: the user's Hugging Face config.
        cases: what to compare; each is a check of the report, in this order. Where layers are one chunk whatever the
            settings say, those that differ in nothing else are one.

    Raises:
        ValueError: not a config of a decoder, or one that cannot be shrunk; the text says why.
    """
    ModelShape.from_config(config)
    sequences = {case.with_whole_layers(): (case.packed, _seq_len(case)) for case in cases}
    sequences |= {case: (case.packed, _seq_len(case)) for case in cases}
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), default_float64(), _one_thread(), _no_warnings():
        model = build_small_model(config, seq_len=max(seq_len for _, seq_len in sequences.values()))
        if has_whole_layers(model):
            cases = list(dict.fromkeys(case.with_whole_layers() for case in cases))
        truths = {
            (packed, seq_len): _Truth.of(model, packed=packed, seq_len=seq_len)
            for packed, seq_len in dict.fromkeys(sequences.values())
        }
        checks = tuple(_check(model, truths[sequences[case]], case) for case in cases)
    return Report(
        model=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=model.config.num_hidden_layers,
        switched_off=random_fields(config),
        checks=checks,
    )


def require_exact(config: PreTrainedConfig, settings: Settings, *, packed: bool) -> None:
    """Check what a run with these settings computes, in a second or two, before it starts.

    Raises:
        ValueError: the model is refused or not exact, or cannot be checked; the text says what differs.
    """
    report = check_model(config, [case_of_run(settings, packed=packed)])
    if not report.is_exact:
        raise ValueError(f"preflight: {report.verdict}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors as small as these take longer on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """What transformers has to say of a config is for the user's, not for the small one."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@dataclass(frozen=True)
class _Truth:
    documents: Documents
    outcome: Outcome

    @classmethod
    def of(cls, model: PreTrainedModel, *, packed: bool, seq_len: int) -> _Truth:
        name = type(model).__name__
        make = Documents.packed if packed else Documents.padded
        documents = make(seq_len, _num_tokens(model.config))
        before = torch.get_rng_state()
        try:
            outcome = run_plain(model, documents)
        except Exception as error:  # of transformers' own model, so none of this project's doing
            raise ValueError(f"{name} cannot be checked: the small model fails with {_line(error)}") from error
        if not torch.equal(torch.get_rng_state(), before):
            raise ValueError(
                f"{name} cannot be checked: no config field switches off the random numbers it trains with"
            )
        return cls(documents, outcome)


def _num_tokens(config: PreTrainedConfig) -> int:
    """Some models have rows for tokens that their logits leave out (Inkling)."""
    num_tokens: int = getattr(config, "unpadded_vocab_size", None) or config.vocab_size
    return num_tokens


def _seq_len(case: Case) -> int:
    """As short as gives each rank the tokens for its chunks, and odd, so that a shard is padded."""
    length_of_shard = ceil_divide(case.min_tokens(), _BATCH_SIZE)
    return max(_MIN_SEQ_LEN, case.settings.sp_size * length_of_shard + 1) | 1


def _check(model: PreTrainedModel, truth: _Truth, case: Case) -> Check:
    try:
        outcome = run_planned(model, truth.documents, case)
    except ValueError as refusal:
        return Check(case, refusal=" ".join(str(refusal).split()))
    except Exception as error:
        return Check(case, defect=f"it fails with {_line(error)}")
    errors = outcome.gradient_errors(truth.outcome)
    # Not a number is worse than any number.
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    loss_error = outcome.loss_error(truth.outcome)
    defect = None
    if not (is_exact(loss_error) and is_exact(errors[worst])):
        defect = _name_culprit(model, truth, case) or f"the gradient of {worst} is off by {errors[worst]:.1e}"
    return Check(case, loss_error, errors[worst], worst, defect=defect)


def _name_culprit(model: PreTrainedModel, truth: _Truth, case: Case) -> str | None:
    """The module that differs first, found by running both again; None where it does not show once more."""
    try:
        plain = run_plain(model, truth.documents, traced=True)
        culprit = find_culprit(model, plain, run_planned(model, truth.documents, case, traced=True))
    except Exception:  # it differs, however its modules take to being watched
        return None
    return None if culprit is None else str(culprit)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
