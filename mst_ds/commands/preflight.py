"""Check that a model trains exactly: mst-preflight --model ... --ds_config ... [flags of mst-train]."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mst_ds.command_line.entry_point import REQUEST_ERRORS, console, refuse, run_command
from mst_ds.config_parser import parse_train_config
from mst_ds.zero import load_ds_config, split_mst

if TYPE_CHECKING:
    from mst_ds.preflight import Report


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 exact, 1 not exact or refused, 2 (and one line on stderr) a request that cannot run."""
    try:
        report = _check(argv)
    except REQUEST_ERRORS as error:
        return refuse("mst-preflight", error)
    from mst_ds.preflight import report_table

    console().print(report_table(report))
    print(report.verdict)
    return 0 if report.is_exact else 1


def _check(argv: Sequence[str]) -> Report:
    config = parse_train_config(argv)
    mst = split_mst(load_ds_config(config.ds_config))[1]
    # From here on imports take seconds; a mistyped flag has been answered already.
    from mst_ds.model_shape import language_config, load_model_config
    from mst_ds.preflight import cases_to_try, check_model, require_same_on_text

    packed = config.packing == "documents"
    whole_config = load_model_config(config.model, trust_remote_code=config.trust_remote_code)
    model_config = language_config(whole_config)
    report = check_model(model_config, cases_to_try(mst, packed=packed))
    if model_config is not whole_config:
        require_same_on_text(whole_config, model_config)
    return report


def cli() -> int:
    """The command of a process; returns its exit code."""
    return run_command("mst-preflight", main)


if __name__ == "__main__":
    sys.exit(cli())
