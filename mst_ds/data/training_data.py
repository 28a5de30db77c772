"""The one place that orders the data path: documents, tokens, split, samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from mst_ds.config import TrainConfig
from mst_ds.data.fitting import fitting_documents
from mst_ds.data.mixing import mix
from mst_ds.data.packing import PackedDataset, split_documents
from mst_ds.data.text_source import load_documents
from mst_ds.data.tokenising import AnswerRows, letters_warning, tokenise_all
from mst_ds.rows.kinds import ADVANTAGES, LABEL, TEXT
from mst_ds.rows.sources import require_rows_that_mix, sources_of


@dataclass(frozen=True)
class TrainingData:
    """What a run reads: `held_out` shares no document with `train`, and is None where `eval_steps` is 0.

    num_documents, fingerprint: of all documents of the dataset, those that are not trained on too, by whose numbers
    samples name theirs. of_documents: of each what its row says of it, by the name of the column, `LABEL` or
    `ADVANTAGES`, where rows do.
    warning, note, mixture, template: what a user should know of the documents, of those that are not trained as they
    are, of what is taken of several datasets, and of the chat template, if anything.
    """

    train: PackedDataset
    held_out: PackedDataset | None
    num_documents: int
    fingerprint: str
    of_documents: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    warning: str | None = None
    note: str | None = None
    mixture: str | None = None
    template: str | None = None

    def amounts(self, num_steps: int, samples_per_step: int) -> dict[str, int | float]:
        """How much there is for training, how often `num_steps` go through it, and how much is held out of it."""
        name = "answers" if LABEL in self.of_documents else "pairs"
        groups = {name: self.train.num_documents // 2} if self.train.group == 2 else {}
        return groups | {
            "documents": self.train.num_documents,
            "tokens": self.train.num_tokens,
            "tokens_learned": self.train.num_learned,
            "samples": len(self.train),
            "seq_len": self.train.seq_len,
            "epochs": num_steps * samples_per_step / len(self.train),
            "samples_held_out": 0 if self.held_out is None else len(self.held_out),
        }


def load_training_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Loads, tokenises and cuts `config.dataset` into samples. Needs no process group, and every rank gets the same.

    Where the user does not say what becomes of documents that are too long, texts are split and all others truncated.

    Raises:
        ValueError: see `sources_of`, `require_rows_that_mix`, `load_documents`, `tokenise_all`, `fitting_documents`,
            `split_documents` and `PackedDataset`.
    """
    sources = sources_of(config)
    documents = [load_documents(source.config) for source in sources]
    group = config.sequences_per_sample
    of_objectives: Mapping[str, AnswerRows] = {"kto": "labelled", "policy": "rollout"}
    answers = of_objectives.get(config.objective)
    of_text = [TEXT in each.column_names for each in documents]
    require_rows_that_mix(zip([source.name for source in sources], of_text, strict=True))
    whole = [repr(source.name) for source in sources]
    if config.dataset_split != TrainConfig.dataset_split:
        whole = [f"{config.dataset_split!r} of {name}" for name in whole]
    tokenised, template = tokenise_all(documents, whole, tokenizer, config.loss_on, answers)
    mixture = mix(
        [source.name for source in sources],
        tokenised,
        [source.weight for source in sources],
        config.seed,
        group,
    )
    tokens = mixture.tokens
    too_long = config.too_long or ("split" if of_text[0] else "truncate")
    fitting = fitting_documents(tokens, config.seq_len, too_long, mixture.rows, group)
    num_held_out = config.eval_samples if config.eval_steps else 0
    train, held_out = split_documents(
        tokens,
        num_held_out,
        config.seq_len,
        config.seed,
        config.packing,
        rows=fitting.rows,
        too_long=too_long,
        group=group,
    )
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    samples = partial(
        PackedDataset, tokens, config.seq_len, pad_id, packing=config.packing, too_long=too_long, group=group
    )
    return TrainingData(
        train=samples(documents=train),
        held_out=samples(documents=held_out, max_samples=num_held_out) if num_held_out else None,
        num_documents=len(tokens),
        fingerprint=tokens._fingerprint,
        of_documents={name: _column(tokens, name) for name in (LABEL, ADVANTAGES) if name in tokens.column_names},
        warning=next(filter(None, (letters_warning(each, tokenizer) for each in documents)), None),
        note=fitting.note(config.seq_len, too_long),
        mixture=mixture.note,
        template=template,
    )


def _column(tokens: Dataset, name: str) -> NDArray[np.generic]:
    """What each document's row says of it, read without the ids."""
    values: NDArray[np.generic] = tokens.select_columns([name]).with_format("arrow")[:][name].to_numpy()
    return values


def describe(amounts: Mapping[str, int | float], num_steps: int) -> str:
    """One line for people, of `TrainingData.amounts`."""
    learned = "" if amounts["tokens_learned"] == amounts["tokens"] else f" ({amounts['tokens_learned']:,} learned)"
    groups = "".join(f"{amounts[name]:,} {name}, " for name in ("pairs", "answers") if name in amounts)
    line = (
        f"data: {groups}{amounts['documents']:,} documents, {amounts['tokens']:,} tokens{learned}, "
        f"{amounts['samples']:,} samples of {amounts['seq_len']}; {num_steps:,} steps are {amounts['epochs']:.3g} "
        "epochs"
    )
    return line + (f"; {amounts['samples_held_out']:,} samples held out" if amounts["samples_held_out"] else "")
