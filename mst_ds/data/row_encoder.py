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
from mst_ds.data.id_rows import ids_and_learned
from mst_ds.data.text_encoder import TextEncoder
from mst_ds.rows.chats import Chat, PromptCompletion, read_row
from mst_ds.rows.kinds import INPUT_IDS, JSON, WHERE


class RowEncoder:
    """Of each row of a table, of the kinds of `mst_ds.rows` other than text, the ids and which are learned.

    A prompt begins as the tokenizer begins a text, and its completion ends with EOS; both are text, as documents are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> None:
        self._tokenizer = tokenizer
        self._loss_on: LossOn = loss_on

    def encode(self, rows: pa.Table, names: Sequence[str]) -> list[Learned]:
        """names: of the rows, for a message, where they do not say themselves where they stand.

        Raises:
            ValueError: a row is not what it should be; see `read_row`, `ChatEncoder` and `ids_and_learned`.
        """
        if WHERE in rows.column_names:
            names = rows[WHERE].to_pylist()
        if INPUT_IDS in rows.column_names:
            num_ids = max(self._tokenizer.get_vocab().values()) + 1
            return [ids_and_learned(rows.slice(at, 1), where, num_ids) for at, where in enumerate(names)]
        samples = [(read_row(row, where), where) for row, where in zip(rows_of(rows), names, strict=True)]
        given = [(each, where) for each, where in samples if isinstance(each, Chat)]
        # Texts alone ask for no chat template.
        chats = iter(self._chats.encode(given) if given else ())
        return [
            self._of_prompt(each, where) if isinstance(each, PromptCompletion) else next(chats)
            for each, where in samples
        ]

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
