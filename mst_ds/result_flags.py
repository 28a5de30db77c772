"""The flags that say where a run's metrics are reported, which of its models it leaves, and where that is uploaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from mst_ds.command_line.flags import flag, joined, words_in

TENSORBOARD = "tensorboard"
# Libraries that a user installs, which are called by their own names.
TRACKERS = ("wandb", "trackio")
_NONE = "none"
_REPORTS = (TENSORBOARD, *TRACKERS, _NONE)


@dataclass
class ResultFlags:
    """Flags of a training run."""

    report_to: str = flag(
        TENSORBOARD,
        "Where metrics go beside metrics.jsonl: tensorboard, wandb, trackio, or several of them; none.",
        nargs="+",
    )
    load_best_model_at_end: bool = flag(
        False, "The model that a run leaves is that of the checkpoint with the lowest evaluation loss; it is kept, too."
    )
    profile: bool = flag(
        False,
        "Time the third step by kind of work, for mst-plan --calibrate, and write its trace into the folder profile.",
    )
    push_to_hub: bool = flag(False, "At the end upload the model to the Hugging Face hub; hf auth login comes first.")
    hub_model_id: str | None = flag(
        None, "Repository of the hub to upload to, owner/name or your name; default: the name of output_dir."
    )
    hub_private_repo: bool = flag(False, "The repository is private, where it is not there yet.")

    def __post_init__(self) -> None:
        self.report_to = joined(self.report_to)

    @property
    def reports(self) -> tuple[str, ...]:
        """Each once, without "none"."""
        return tuple(dict.fromkeys(word for word in words_in(self.report_to) if word != _NONE))

    def check_results(self, *, eval_steps: int, save_steps: int) -> None:
        """Check these flags beside others, without network.

        Raises:
            ValueError: one line with what was given and what is allowed.
        """
        self._check_reports()
        if not self.push_to_hub:
            for name, default in (("hub_model_id", None), ("hub_private_repo", False)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, but push_to_hub is false; allowed: --push_to_hub true "
                        f"too, or no --{name}"
                    )
        # As transformers' TrainingArguments have it.
        if self.load_best_model_at_end and not (0 < eval_steps <= save_steps and save_steps % eval_steps == 0):
            raise ValueError(
                f"load_best_model_at_end is true, but save_steps is {save_steps} and eval_steps is {eval_steps}; "
                "allowed: both above 0, save_steps a multiple of eval_steps, so that what is saved has been evaluated"
            )

    def _check_reports(self) -> None:
        words = words_in(self.report_to)
        if not words or not set(words) <= set(_REPORTS) or (_NONE in words and len(set(words)) > 1):
            raise ValueError(
                f"report_to is {self.report_to!r}; allowed: {', '.join(_REPORTS[:-1])}, several of them, or {_NONE}"
            )
        for name in TRACKERS:
            if name in words and not _is_installed(name):
                raise ValueError(f"report_to is {name!r}, which is not installed: install it with pip install {name}")


def _is_installed(name: str) -> bool:
    """Not so of a folder of that name, as wandb leaves one where it has run: that is a package without a file."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None
