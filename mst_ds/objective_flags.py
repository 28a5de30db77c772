"""The flags that say what a training step minimises; without a library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from mst_ds.command_line.flags import flag

ObjectiveName: TypeAlias = Literal["sft", "dpo", "ipo", "simpo", "kto", "policy"]
PolicyLoss: TypeAlias = Literal["dapo", "grpo", "dr_grpo"]

# As TRL has them, SimPO's as its paper.
_BETA: Mapping[str, float] = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "kto": 0.1}
GAMMA_BETA_RATIO = 0.5
_MOST = 1e6


@dataclass
class ObjectiveFlags:
    """Flags of a training run and of a plan."""

    objective: ObjectiveName = flag(  # noqa: RUF009 - the alias hides from ruff that the type is immutable
        "sft",
        "What a step minimises: sft, the cross-entropy of what is learned; dpo, ipo, simpo: preferences, of rows with "
        "a chosen and a rejected answer; kto: of rows with one answer and a label, whether it is desirable; policy: of "
        "rows with a sampled answer and its advantages.",
    )
    beta: float | None = flag(
        None, "How strongly a preference holds the model to its reference; default: 0.1, of simpo 2.0."
    )
    label_smoothing: float = flag(0.0, "Part of the preferences that is taken to be wrong, of dpo and simpo.")
    gamma_beta_ratio: float = flag(GAMMA_BETA_RATIO, "The margin of simpo, divided by beta.")
    desirable_weight: float = flag(1.0, "Weight of the desirable answers of kto.")
    undesirable_weight: float = flag(1.0, "Weight of the undesirable answers of kto.")
    loss_type: PolicyLoss = flag(  # noqa: RUF009 - see objective
        "dapo",
        "What policy takes a mean over: dapo, all tokens; grpo, those of an answer, and then the answers; "
        "dr_grpo: seq_len for each answer, and then the answers.",
    )
    epsilon: float = flag(0.2, "How far below 1 a ratio of policy may fall before it is clipped.")
    epsilon_high: float | None = flag(None, "How far above 1 it may rise; default: epsilon.")

    @property
    def has_answers(self) -> bool:
        """Whether answers are compared or weighed, and not learned as they are."""
        return self.objective != "sft"

    @property
    def has_reference(self) -> bool:
        """Whether the objective compares the model with the one that the run starts from."""
        return self.objective in ("dpo", "ipo", "kto")

    @property
    def sequences_per_sample(self) -> int:
        """A sample has the tokens of so many sequences of `seq_len`: a pair is two, and so is an answer of kto, beside
        which another one stands behind the same prompt."""
        return 2 if self.objective in _BETA else 1

    @property
    def beta_or_default(self) -> float:
        """The user's, or the objective's default; 0 of one that has none."""
        return _BETA.get(self.objective, 0.0) if self.beta is None else self.beta

    def check_objective(self, given: frozenset[str], *, too_long: str | None, loss_on: str) -> None:
        """Check these flags, and those of the data that an objective does not go with.

        Args:
            given: names of the flags that the user gave.
            too_long, loss_on: the values of these flags.

        Raises:
            ValueError: one line with what was given and what is allowed.
        """
        for name, words in (("objective", get_args(ObjectiveName)), ("loss_type", get_args(PolicyLoss))):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(words)}")
        of_objectives = {
            "beta": ("dpo", "ipo", "simpo", "kto"),
            "label_smoothing": ("dpo", "simpo"),
            "gamma_beta_ratio": ("simpo",),
            "desirable_weight": ("kto",),
            "undesirable_weight": ("kto",),
            "loss_type": ("policy",),
            "epsilon": ("policy",),
            "epsilon_high": ("policy",),
        }
        for name, objectives in of_objectives.items():
            if name in given and self.objective not in objectives:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, which objective {self.objective!r} has not; allowed: no "
                    f"--{name}, or --objective {' or '.join(objectives)}"
                )
        checks = {
            "beta": (self.beta is None or 0 < self.beta <= _MOST, f"a number > 0 and at most {_MOST:g}"),
            "epsilon": (0 < self.epsilon < 1, "a number > 0 and below 1"),
            "epsilon_high": (
                self.epsilon_high is None or 0 < self.epsilon_high <= _MOST,
                f"a number > 0 and at most {_MOST:g}",
            ),
            "label_smoothing": (0 <= self.label_smoothing < 0.5, "a number from 0 up to, not including, 0.5"),
        }
        for name in ("gamma_beta_ratio", "desirable_weight", "undesirable_weight"):
            checks[name] = (0 <= getattr(self, name) <= _MOST, f"a number >= 0 and at most {_MOST:g}")
        for name, (is_allowed, allowed) in checks.items():
            if not is_allowed:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {allowed}")
        if self.has_answers and too_long == "split":
            raise ValueError(
                f"too_long is 'split', but objective {self.objective!r} is about whole answers; allowed: truncate or "
                "drop"
            )
        if self.has_answers and "text_column" in given:
            raise ValueError(
                f"text_column is given, but objective {self.objective!r} reads answers in columns of their own names; "
                "allowed: no --text_column"
            )
        if self.has_answers and loss_on == "all":
            raise ValueError(
                f"loss_on is 'all', but objective {self.objective!r} is about what follows a prompt; allowed: "
                "assistant or last_assistant"
            )
