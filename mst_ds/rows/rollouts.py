"""What a row with a sampled answer says of it: the advantage, and how likely its tokens were to the policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mst_ds.rows.kinds import ADVANTAGES, OLD_LOGPS


@dataclass(frozen=True)
class Rollout:
    """advantage: of the whole answer. old_logps: of each token that is learned; None where the policy is the model."""

    advantage: float
    old_logps: list[float] | None


def read_rollout(row: Mapping[str, Any], where: str) -> Rollout:
    """Of a row that also has a prompt and its completion, or ids.

    Raises:
        ValueError: the advantage is no number, or the log-probabilities are none.
    """
    advantage, old_logps = row.get(ADVANTAGES), row.get(OLD_LOGPS)
    if not _is_number(advantage) or advantage is None:
        raise ValueError(f"{where} has the advantages {advantage!r}; allowed: one number for the whole answer")
    if old_logps is None:
        return Rollout(float(advantage), None)
    if not isinstance(old_logps, list) or not all(_is_number(each) and each <= 0 for each in old_logps):
        raise ValueError(
            f"{where} has {OLD_LOGPS!r} that are no list of log-probabilities; allowed: a number <= 0 for each token "
            "that is learned"
        )
    return Rollout(float(advantage), [float(each) for each in old_logps])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
