"""Documents that are more than a text, to ids and which of them are learned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from mst_ds.config import LossOn
from mst_ds.data.chat_encoder import ChatEncoder, Learned
from mst_ds.data.id_rows import ids_and_learned, require_ids
from mst_ds.data.text_encoder import TextEncoder
from mst_ds.rows.chats import Chat, PromptCompletion, read_row
from mst_ds.rows.kinds import ATTENTION_MASK, CHOSEN, INPUT_IDS, JSON, LABELS, WHERE
from mst_ds.rows.preferences import read_label, read_preference
from mst_ds.rows.rollouts import Rollout, read_rollout


class RowEncoder:
    """Of each row of a table, of the kinds of `mst_ds.rows` other than text, the ids and which are learned.

    A preference gives two documents, the chosen answer behind its prompt and then the rejected one.

    A prompt begins as the tokenizer begins a text, and its completion ends with EOS; both are text, as documents are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> None:
        self._tokenizer = tokenizer
        self._loss_on: LossOn = loss_on

    def encode(self, rows: pa.Table, names: Sequence[str]) -> list[Learned]:
        """names: of the rows, for a message, where they do not say themselves where they stand.

        Raises:
            ValueError: a row is not what it should be; see `read_row`, `read_preference`, `ChatEncoder` and
                `ids_and_learned`.
        """
        names = _names(rows, names)
        if INPUT_IDS in rows.column_names:
            return [ids_and_learned(rows.slice(at, 1), where, self._num_ids) for at, where in enumerate(names)]
        samples = [each for row, where in zip(rows_of(rows), names, strict=True) for each in _samples(row, where)]
        given = [(each, where) for each, where in samples if isinstance(each, Chat)]
        # Texts alone ask for no chat template.
        chats = iter(self._chats.encode(given) if given else ())
        return [
            self._of_prompt(each, where) if isinstance(each, PromptCompletion) else next(chats)
            for each, where in samples
        ]

    def encode_labelled(self, rows: pa.Table, names: Sequence[str]) -> tuple[list[Learned], list[bool]]:
        """Of each row two documents: its answer behind its prompt, and there the answer of the row before it, or of the
        last one, as TRL has it; and of both whether the row's answer is desirable.

        Raises:
            ValueError: see `encode` and `read_label`.
        """
        own = self.encode(rows, names)
        names = _names(rows, names)
        labels = [read_label(row, where) for row, where in zip(rows_of(rows), names, strict=True)]
        others = [_with_answer_of(each, before) for each, before in zip(own, own[-1:] + own[:-1], strict=True)]
        documents = [document for pair in zip(own, others, strict=True) for document in pair]
        return documents, [label for label in labels for _ in range(2)]

    def encode_rollouts(self, rows: pa.Table, names: Sequence[str]) -> tuple[list[Learned], list[Rollout]]:
        """Of each row the document, and what is said of it, the log-probabilities of all its ids: NaN where the row has
        none, 0 where nothing is learned.

        Raises:
            ValueError: see `encode` and `read_rollout`; or there are not as many log-probabilities as learned ids.
        """
        names = _names(rows, names)
        given = list(rows_of(rows))
        if given and INPUT_IDS in given[0]:
            num_ids = self._num_ids
            documents = [
                ids_and_learned(_ids_table(row, where), where, num_ids) for row, where in zip(given, names, strict=True)
            ]
        else:
            documents = self.encode(rows, names)
        rollouts = []
        for row, where, (_, learned) in zip(given, names, documents, strict=True):
            rollout = read_rollout(row, where)
            of_ids = np.where(learned, np.nan, 0.0)
            if rollout.old_logps is not None:
                if len(rollout.old_logps) != learned.sum():
                    raise ValueError(
                        f"{where} has {len(rollout.old_logps)} old_logps for {int(learned.sum())} learned tokens; "
                        "allowed: as many; nearest: rows of 'input_ids' and 'labels', as they were sampled"
                    )
                of_ids[learned] = rollout.old_logps
            rollouts.append(Rollout(rollout.advantage, of_ids.tolist()))
        return documents, rollouts

    @cached_property
    def _num_ids(self) -> int:
        return max(self._tokenizer.get_vocab().values()) + 1

    @cached_property
    def _texts(self) -> TextEncoder:
        return TextEncoder(self._tokenizer)

    @cached_property
    def _chats(self) -> ChatEncoder:
        return ChatEncoder(self._tokenizer, self._loss_on)

    def _of_prompt(self, row: PromptCompletion, where: str) -> Learned:
        """The prompt goes on in the completion: what the model reads alone has the same ids as before it."""
        prompt, whole = self._texts.encode_whole([row.prompt, row.prompt + row.completion])
        if whole[: len(prompt)] != prompt:
            raise ValueError(
                f"{where} has a token across the border of its prompt, which ends with {row.prompt[-30:]!r}, and its "
                f"completion, {row.completion[:30]!r}; allowed: a border between tokens; nearest: white space at the "
                "beginning of the completion, and not at the end of the prompt"
            )
        self._texts.require_text(whole)
        ids = [*self._texts.prefix, *whole, self._tokenizer.eos_token_id]
        given = 0 if self._loss_on == "all" else len(self._texts.prefix) + len(prompt)
        return np.array(ids, dtype=np.int32), np.arange(len(ids)) >= given


def _samples(row: dict[str, Any], where: str) -> list[tuple[Chat | PromptCompletion, str]]:
    if CHOSEN in row:
        pair = read_preference(row, where)
        return [(pair.chosen, f"the chosen answer of {where}"), (pair.rejected, f"the rejected answer of {where}")]
    return [(read_row(row, where), where)]


def _names(rows: pa.Table, names: Sequence[str]) -> Sequence[str]:
    """Where rows stand, as they say themselves, or else these."""
    found: Sequence[str] = rows[WHERE].to_pylist() if WHERE in rows.column_names else names
    return found


def _ids_table(row: dict[str, Any], where: str) -> pa.Table:
    """Of a row that is written as JSON what says its ids."""
    values = {name: row[name] for name in (INPUT_IDS, LABELS, ATTENTION_MASK) if row.get(name) is not None}
    for name, each in values.items():
        require_ids(each, name, where)
    return pa.table({name: pa.array([each], pa.list_(pa.int64())) for name, each in values.items()})


def _with_answer_of(own: Learned, other: Learned) -> Learned:
    """The prompt of the one, up to the first id that is learned, and what follows the prompt of the other."""
    (prompt, _), (answer, learned) = own, other
    end, begin = (int(np.argmax(each)) if each.any() else len(each) for _, each in (own, other))
    ids = np.concatenate([prompt[:end], answer[begin:]])
    return ids, np.concatenate([np.zeros(end, dtype=bool), learned[begin:]])


def rows_of(rows: pa.Table) -> Iterator[dict[str, Any]]:
    """Each row as it was written, by the names of columns; a field that only other rows have is not in it."""
    if JSON in rows.column_names:
        yield from (json.loads(text) for text in rows[JSON].to_pylist())
        return
    for row in rows.to_pylist():
        yield {name: _filled(value) for name, value in row.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _filled(item) for name, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value
