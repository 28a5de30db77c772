"""What the user asked for: the flags of a training run.

`TrainConfig` is the only list of flags, with those of `adapter_flags`, `objective_flags` and `result_flags`; the
parser, the defaults, the help text and the YAML keys are all read from its fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from mst_ds.adapter_flags import AdapterFlags
from mst_ds.command_line.flags import flag
from mst_ds.files.read_file import expanded
from mst_ds.files.shipped import shipped_folder
from mst_ds.objective_flags import ObjectiveFlags
from mst_ds.optimizers import ADAMW, check_optim
from mst_ds.result_flags import ResultFlags

GIB = 2**30
DEFAULT_MODEL = "small_llama"
# Its full path, so that the command runs from any folder.
DEFAULT_DS_CONFIG = str(shipped_folder("ds_configs") / "zero3_mst.json")

Auto: TypeAlias = Literal["auto"]
AUTO: Auto = "auto"
# A label that no loss counts, as in torch and transformers.
IGNORE_INDEX = -100
# Repositories of the Hugging Face hub, by the names that transformers takes.
_ATTENTION_OF_HUB = (
    "kernels-community/flash-attn2",
    "kernels-community/flash-attn3",
    "kernels-community/vllm-flash-attn3",
)
ATTENTION_IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", *_ATTENTION_OF_HUB)
# Those that have a softcap.
SOFTCAP_ATTENTION = ("flash_attention_2", *_ATTENTION_OF_HUB)
Packing: TypeAlias = Literal["documents", "none"]
LossOn: TypeAlias = Literal["assistant", "last_assistant", "all"]
TooLong: TypeAlias = Literal["split", "truncate", "drop"]
NonFinite: TypeAlias = Literal["stop", "skip"]

# The schedules of transformers that need no more than the steps and the warm-up.
_SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)

_LENGTH_SUFFIXES = {"": 1, "K": 1024, "M": 1024**2}

# Above every number that has a use: what is larger is a mistake, or would overflow in fp32.
MOST = 1e30
MOST_RATE = 1e3
MOST_TOKENS = 2**36
_MOST_STEPS = 2**40
_MOST_WORKERS = 2**10
_MOST_MINUTES = 60 * 24 * 366
# Ranks meet, load weights and write checkpoints while others wait: what is shorter kills runs that are well.
_LEAST_TIMEOUT = 1.0
# torch keeps milliseconds and gloo adds them to the time of day; a year is longer than any wait.
_MOST_TIMEOUT = 366 * 24 * 3600.0

# The least and the most of each flag with a number, and what is said to be allowed.
_RANGES: Mapping[str, tuple[float, float, str]] = {
    "seq_len": (1, MOST_TOKENS, f"a whole number >= 1 and at most {MOST_TOKENS}"),
    "per_device_train_batch_size": (1, MOST_TOKENS, f"a whole number >= 1 and at most {MOST_TOKENS}"),
    "gradient_accumulation_steps": (1, _MOST_STEPS, f"a whole number >= 1 and at most {_MOST_STEPS}"),
    "max_steps": (1, _MOST_STEPS, f"a whole number >= 1 and at most {_MOST_STEPS}"),
    "show_samples": (0, _MOST_STEPS, f"a whole number >= 0 and at most {_MOST_STEPS}"),
    "dataloader_num_workers": (0, _MOST_WORKERS, f"a whole number >= 0 and at most {_MOST_WORKERS}"),
    "save_total_limit": (1, _MOST_STEPS, f"a whole number >= 1 and at most {_MOST_STEPS}"),
    "seed": (0, 2**32 - 1, "0 to 2**32 - 1"),
    "eval_steps": (0, _MOST_STEPS, f"a number >= 0 and at most {_MOST_STEPS}"),
    "eval_samples": (0, _MOST_STEPS, f"a number >= 0 and at most {_MOST_STEPS}"),
    "save_steps": (0, _MOST_STEPS, f"a number >= 0 and at most {_MOST_STEPS}"),
    "save_minutes": (0, _MOST_MINUTES, f"a number >= 0 and at most {_MOST_MINUTES}, a year"),
    "weight_decay": (0, MOST_RATE, f"a number >= 0 and at most {MOST_RATE:g}"),
    "max_grad_norm": (0, MOST, f"a number >= 0 and at most {MOST:g}"),
    "hang_timeout": (_LEAST_TIMEOUT, _MOST_TIMEOUT, f"seconds, {_LEAST_TIMEOUT:g} to {_MOST_TIMEOUT:.0f}, a year"),
    "adam_beta1": (0, math.nextafter(1, 0), "a number from 0 up to, not including, 1"),
    "adam_beta2": (0, math.nextafter(1, 0), "a number from 0 up to, not including, 1"),
    # The smallest number of fp32 above 0 that is not denormal: AdamW divides by it where a gradient is 0.
    "adam_epsilon": (1.2e-38, 1.0, "a number > 0 and at most 1"),
}


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`"; nearest: 'x'"` for the allowed word most like `given`, or `""` when none is alike."""
    matches = difflib.get_close_matches(given, list(allowed), n=1)
    return f"; nearest: {matches[0]!r}" if matches else ""


def parse_seq_len(text: str) -> int:
    """Reads a length in tokens: `"4096"`, `"128K"` (K = 1024) or `"1M"` (M = 1024²).

    Raises:
        ValueError: `text` is not a whole number with an optional K or M.
    """
    match = re.fullmatch(r"([+-]?\d+)([KM]?)", text.strip().upper())
    if match is None:
        raise ValueError(f"seq_len is {text!r}; allowed: a whole number of tokens such as 4096, 128K or 1M")
    return int(match[1]) * _LENGTH_SUFFIXES[match[2]]


@dataclass
class _RunFlags:
    """All other flags, in the order of the help."""

    config: str | None = flag(
        None, "YAML file with values for any of these flags; a flag given beside it wins.", os.path.expanduser
    )
    ds_config: str = flag(
        DEFAULT_DS_CONFIG,
        "DeepSpeed JSON with an optional 'mst' block, or a shipped one's name.",
        os.path.expanduser,
    )
    model: str = flag(
        DEFAULT_MODEL,
        "Shipped config, Hugging Face id, or folder. A folder with only a config starts from random weights.",
        os.path.expanduser,
    )
    trust_remote_code: bool = flag(
        False, "Run the code that a model or tokenizer brings itself; without it such a model is refused."
    )
    rope_scaling: str | None = flag(
        None, "For sequences longer than the model was made for: a type of RoPE scaling and its factor, yarn:4."
    )
    new_lm_head: bool = flag(False, "Start the LM head, which the weights must lack, from random values.")
    chat_template_path: str | None = flag(
        None, "File of a chat template (Jinja) in place of the tokenizer's own; saved with it.", os.path.expanduser
    )
    tokenizer: str | None = flag(
        None, "Hugging Face id or folder; default: the model's own, bytes for shipped configs.", os.path.expanduser
    )
    add_tokens: list[str] | None = flag(  # noqa: RUF009 - see packing
        None, "Words to add to the tokenizer, a token each, and rows for them to the model, where it has none left."
    )
    add_special_tokens: list[str] | None = flag(  # noqa: RUF009 - see packing
        None, "As add_tokens, but control tokens: what a chat template writes, and only letters in any text."
    )
    dataset: str | list[str] = flag(  # noqa: RUF009 - see packing
        "python_stdlib",
        "Shipped name, Hugging Face id, or a .txt, .jsonl, .json, .csv or .parquet file or folder of them; .gz, .zst. "
        "Several, a:0.7 b:0.3, are mixed in these shares of documents, and without weights joined.",
    )
    dataset_config: str | None = flag(None, "Configuration of a dataset from the Hugging Face hub.")
    dataset_split: str = flag("train", "Split of a dataset from the Hugging Face hub.")
    text_column: str = flag(
        "text", "Column of the dataset that holds the text; where it is given, no other column is read."
    )
    loss_on: LossOn = flag(  # noqa: RUF009 - see packing
        "assistant", "What is learned of a chat: assistant, or the completion of a prompt; last_assistant; all."
    )
    too_long: TooLong | None = flag(  # noqa: RUF009 - see packing
        None,
        "Documents longer than a sequence: split, truncate or drop; default: truncate, but split for text. Only with "
        "split may a sample's end cut a document.",
    )
    seq_len: int = flag(4096, "Tokens in a sequence, over all its shards: 4096, 128K, 1M.", parse_seq_len)
    packing: Packing = flag(  # noqa: RUF009 - the alias hides from ruff that the type is immutable
        "documents", "documents: several to a sample, each as if alone; none: one to a sample, then padding."
    )
    show_samples: int = flag(0, "Samples to print before the first step, as text, with what of them is learned.")
    dataloader_num_workers: int = flag(
        0, "Processes of each rank that make batches ahead, and as many for evaluations; 0: none."
    )
    dataloader_pin_memory: bool = flag(True, "Batches lie in pinned memory, where there is an accelerator.")
    per_device_train_batch_size: int | None = flag(
        None, "Sequences of a micro-batch, where the JSON's train_micro_batch_size_per_gpu is 'auto'; default: 1."
    )
    gradient_accumulation_steps: int | None = flag(
        None, "Micro-batches of a step, where the JSON's gradient_accumulation_steps is 'auto'; default: 1."
    )
    max_steps: int = flag(150, "Optimizer steps.")
    num_train_epochs: float | None = flag(
        None, "In place of max_steps: how often the run goes through its samples, a fraction too."
    )
    optim: str = flag(
        ADAMW, "Optimizer, as transformers calls it: adamw_torch, adamw_8bit (of bitsandbytes: moments of 8 bits), sgd."
    )
    learning_rate: float | None = flag(
        None, "Peak learning rate; default: 2e-5, for small_llama 4e-3, for preferences 1e-6."
    )
    lr_scheduler_type: str = flag("cosine", "Name of a transformers schedule, such as cosine, linear, constant.")
    warmup_steps: int | None = flag(
        None, "Optimizer steps over which the learning rate rises from 0; default: a tenth of the run's."
    )
    weight_decay: float = flag(0.01, "Weight decay of what is no norm and no bias.")
    adam_beta1: float = flag(0.9, "Decay rate of AdamW's first moment.")
    adam_beta2: float = flag(0.95, "Decay rate of AdamW's second moment.")
    adam_epsilon: float = flag(1e-8, "Term added to AdamW's denominator.")
    max_grad_norm: float = flag(1.0, "Gradient norm to clip at where the JSON's gradient_clipping is 'auto'.")
    seed: int = flag(42, "Seed of the weights and of the order of the data.")
    eval_steps: int = flag(0, "Optimizer steps between evaluations on the held-out part; 0: none.")
    eval_samples: int = flag(8, "Sequences in the held-out part.")
    output_dir: str | None = flag(None, "Folder for metrics, checkpoints and the model; default: runs/<date-time>.")
    save_steps: int = flag(0, "Optimizer steps between checkpoints; 0: none by steps.")
    save_minutes: float = flag(0.0, "Minutes between checkpoints; 0: none by time.")
    save_total_limit: int = flag(2, "Checkpoints that are kept, the newest ones.")
    resume: str | None = flag(
        None, "auto: go on from the newest checkpoint in output_dir, where there is one; or the folder of a checkpoint."
    )
    non_finite: NonFinite = flag(  # noqa: RUF009 - see packing
        "stop", "stop: a step whose loss or gradient norm is NaN or inf ends the run; skip: it is left out and counted."
    )
    hang_timeout: float = flag(1800.0, "Seconds that ranks wait for one that does not answer before all end.")
    preflight: bool = flag(
        True,
        "Before the run compare a small model of this architecture with transformers' own, and refuse what differs.",
    )
    local_rank: int = flag(-1, "Set by the DeepSpeed launcher: this process's rank on its node.")


@dataclass
class TrainConfig(AdapterFlags, ObjectiveFlags, ResultFlags, _RunFlags):
    """The flags of a training run. Lengths are in tokens, `weight_decay` and the rates as the optimizer has them."""

    def __post_init__(self) -> None:
        AdapterFlags.__post_init__(self)
        ResultFlags.__post_init__(self)
        if isinstance(self.dataset, list) and len(self.dataset) == 1:
            self.dataset = self.dataset[0]

    def changed(self, **values: Any) -> TrainConfig:
        """A copy with other values; what the user gave stays what it was."""
        copy = dataclasses.replace(self, **values)
        copy.given = self.given
        return copy

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """What the flags add to the tokenizer, control tokens last."""
        return (*(self.add_tokens or ()), *(self.add_special_tokens or ()))

    @property
    def sample_len(self) -> int:
        """Tokens in a sample: what a step works through at once."""
        return self.seq_len * self.sequences_per_sample

    @property
    def has_documents(self) -> bool:
        """Whether several documents may lie in a sample."""
        return self.packing == "documents" or self.sequences_per_sample > 1

    @property
    def dataset_name(self) -> str:
        return self.dataset if isinstance(self.dataset, str) else " ".join(self.dataset)

    @property
    def peak_learning_rate(self) -> float:
        """The user's, or a default: what a model of half a million parameters needs would ruin a pretrained one."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.has_answers:
            return 1e-6  # as TRL has it
        return 4e-3 if self.model == DEFAULT_MODEL else 2e-5

    @property
    def num_warmup_steps(self) -> int:
        """Steps of warm-up, a tenth of the run where the user said nothing."""
        return self.max_steps // 10 if self.warmup_steps is None else self.warmup_steps

    def validate(self) -> None:
        """Checks every value that needs neither the model nor the data.

        Raises:
            ValueError: one line with what was given and what is allowed.
        """
        for name, (least, most, allowed) in _RANGES.items():
            value = getattr(self, name)
            _require(value is None or least <= value <= most, name, value, allowed)
        self.check_adapters()
        self.check_objective(self.given, too_long=self.too_long, loss_on=self.loss_on)
        self.check_results(eval_steps=self.eval_steps, save_steps=self.save_steps)
        _require(
            0 < self.peak_learning_rate <= MOST_RATE,
            "learning_rate",
            self.learning_rate,
            f"a number > 0 and at most {MOST_RATE:g}",
        )
        _check_tokens(self.add_tokens, self.add_special_tokens)
        check_optim(self.optim, self.given)
        self._check_steps()
        if self.eval_steps > 0:
            _require(
                self.eval_samples >= 1,
                "eval_samples",
                self.eval_samples,
                "at least 1 where eval_steps is not 0",
            )
        choices = {"packing": Packing, "loss_on": LossOn, "too_long": TooLong, "non_finite": NonFinite}
        for name, words in {name: get_args(choice) for name, choice in choices.items()}.items():
            value = getattr(self, name)
            _require(value in words or (name == "too_long" and value is None), name, value, " or ".join(words))
        if self.resume == AUTO and self.output_dir is None:
            raise ValueError("resume is 'auto', but no output_dir says where to look; allowed: give --output_dir too")
        if self.resume not in (None, AUTO) and not expanded(str(self.resume), "resume").is_dir():
            raise ValueError(f"resume is {self.resume!r}; allowed: 'auto', or the folder of a checkpoint")
        _check_scheduler(self.lr_scheduler_type)
        if self.output_dir is not None:
            _check_writable(expanded(self.output_dir, "output_dir"))

    def _check_steps(self) -> None:
        epochs = self.num_train_epochs
        if epochs is not None:
            _require(0 < epochs <= _MOST_STEPS, "num_train_epochs", epochs, f"a number > 0 and at most {_MOST_STEPS}")
            if "max_steps" in self.given:
                raise ValueError(
                    f"num_train_epochs is {epochs:g} and max_steps is {self.max_steps}; allowed: one of them"
                )
        # How many steps epochs are is known when the data is there.
        most, allowed = (
            (self.max_steps, f"0 to max_steps ({self.max_steps})")
            if epochs is None
            else (_MOST_STEPS, "0 to the steps of the run")
        )
        _require(
            self.warmup_steps is None or 0 <= self.warmup_steps <= most, "warmup_steps", self.warmup_steps, allowed
        )


def _require(condition: bool, name: str, given: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {given!r}; allowed: {allowed}")


def _check_tokens(*flags: list[str] | None) -> None:
    """Makes sure that each is there, and once."""
    tokens = [token for each in flags for token in each or ()]
    for token in tokens:
        if not token.strip() or tokens.count(token) > 1:
            says = "is there twice" if token.strip() else "is white space"
            raise ValueError(f"the added token {token!r} {says}; allowed: words, each once")


def _check_scheduler(name: str) -> None:
    if name not in _SCHEDULES:
        raise ValueError(f"lr_scheduler_type is {name!r}; allowed: {', '.join(_SCHEDULES)}{nearest(name, _SCHEDULES)}")


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"output_dir is {str(folder)!r}, but {existing} is a file; allowed: a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"output_dir is {str(folder)!r}, but {existing} is not writable; allowed: a folder you can write"
        )
