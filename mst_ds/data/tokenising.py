"""Documents to token ids, in a file that every rank finds again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from filelock import FileLock
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from mst_ds.config import LossOn
from mst_ds.data.batching import documents_at_once, with_neighbours
from mst_ds.data.chat_encoder import Learned
from mst_ds.data.chat_template import AnswersNotToldError, strings_in
from mst_ds.data.long_texts import Text
from mst_ds.data.row_encoder import RowEncoder, rows_of
from mst_ds.data.text_encoder import TextEncoder, control_tokens_in
from mst_ds.data.training_template import training_template
from mst_ds.rows.kinds import ADVANTAGES, INPUT_IDS, JSON, LABEL, OLD_LOGPS, TEXT

LEARNED = "learned"
"""The column that says of each id whether it is learned; without it all are."""

AnswerRows: TypeAlias = Literal["labelled", "rollout"]

# What a chat template has written has control tokens from the first document on.
_DOCUMENTS_LOOKED_AT = 16


def tokenise_all(
    datasets: Sequence[Dataset],
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    loss_on: LossOn,
    rows: AnswerRows | None = None,
) -> tuple[list[Dataset], str | None]:
    """`tokenise` for each dataset, and in one line by which chat template, where it is not the tokenizer's own.

    Where that does not tell the answers of a chat, all chats are written by TRL's training template of it, if there is
    one; so alike chats are trained alike. The tokenizer, and what is saved of it, stays as it is.

    Args:
        names: of each dataset, for a message about a row of it.
        rows: see `tokenise`.

    Raises:
        ValueError: see `tokenise`.
    """
    try:
        return [
            tokenise(each, tokenizer, loss_on, name, rows) for each, name in zip(datasets, names, strict=True)
        ], None
    except AnswersNotToldError as error:
        found = training_template(tokenizer)
        if found is None:
            raise
        reason = str(error).partition(";")[0].removeprefix("the chat template ")
    marking = copy.copy(tokenizer)
    marking.chat_template = found.template
    note = (
        f"chat template: TRL's training template of {found.name}, because the tokenizer's own {reason}; the model is "
        "saved with the tokenizer's own"
    )
    return [tokenise(each, marking, loss_on, name, rows) for each, name in zip(datasets, names, strict=True)], note


def tokenise(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    loss_on: LossOn = "assistant",
    name: str = "the dataset",
    rows: AnswerRows | None = None,
) -> Dataset:
    """Token ids, one row per document in the column "input_ids" (int32), and for all but text `LEARNED` (bool).

    Texts are encoded as `TextEncoder` does, rows without text left out, and all others as `RowEncoder` does. The result
    is an Arrow file in the cache of `datasets`, found again by the fingerprints of the documents and of the tokenizer,
    its chat template as well, and by `loss_on`. Memory is some hundred MiB and up to twice that of the longest
    document's ids, if the tokenizer can be used on parts of a text (see `long_texts`); a chat is encoded as a whole.

    Args:
        documents: the result of `load_documents`.
        name: of the dataset, for a message about a row that says not itself where it stands.
        rows: of answers what they say of each: the column `LABEL` is in the result, or `ADVANTAGES` and `OLD_LOGPS`.

    Raises:
        ValueError: text that is not UTF-8, or that the tokenizer cannot but take for control tokens; or see
            `RowEncoder`.
    """
    table = documents.with_format("arrow")
    # What reading them took, up to some times a text, Arrow keeps for later: it would lie beside the ids.
    pa.default_memory_pool().release_unused()
    features = {INPUT_IDS: ListOf(Value("int32"))}
    is_text = TEXT in documents.column_names
    if not is_text:
        features[LEARNED] = ListOf(Value("bool"))
    if rows == "labelled":
        features[LABEL] = Value("bool")
    if rows == "rollout":
        features |= {ADVANTAGES: Value("float64"), OLD_LOGPS: ListOf(Value("float32"))}
    of_rows = {"tokenizer": tokenizer, "loss_on": loss_on, "name": name, "kind": rows}
    at_once = documents_at_once(_lengths(table[:]))
    if rows == "labelled":
        at_once = with_neighbours(at_once, len(documents))
    try:
        with _one_process_at_a_time(documents):
            tokens = table.map(
                _encode if is_text else _encode_rows,
                batched=True,
                batch_size=at_once,
                fn_kwargs={"tokenizer": tokenizer} if is_text else of_rows,
                with_indices=not is_text,
                remove_columns=documents.column_names,
                features=Features(features),
                desc="Tokenising",
            )
    except UnicodeDecodeError as error:
        raise ValueError(f"a document of the dataset is not UTF-8 text ({error}); allowed: UTF-8") from error
    return tokens.with_format(None)


def letters_warning(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A warning, in one line, where the first documents spell out control tokens; None where they do not."""
    first = documents.with_format("arrow")[:_DOCUMENTS_LOOKED_AT]
    if not (found := control_tokens_in(_strings(first), tokenizer)):
        return None
    return (
        f"warning: documents spell out {', '.join(map(repr, found[:3]))}, control tokens of the tokenizer, which are "
        "only letters in a text: what a chat template has written is not trained as the chat it stands for"
    )


def _lengths(rows: pa.Table) -> NDArray[np.int64]:
    """Bytes of each row; where they are not known, as if all were of the same length."""
    for name in (TEXT, JSON):
        if name in rows.column_names:
            return pc.binary_length(rows[name]).fill_null(0).to_numpy().astype(np.int64)
    return np.full(len(rows), rows.nbytes // max(1, len(rows)), dtype=np.int64)


def _encode(rows: pa.Table, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    ids, lengths = _text_encoder(tokenizer).encode(_texts(rows))
    values = pa.Array.from_buffers(pa.int32(), len(ids), [None, pa.py_buffer(ids)])
    return pa.table({INPUT_IDS: _lists(values, lengths)})


def _encode_rows(
    rows: pa.Table,
    numbers: list[int],
    tokenizer: PreTrainedTokenizerBase,
    loss_on: LossOn,
    name: str,
    kind: AnswerRows | None,
) -> pa.Table:
    encoder, names = _row_encoder(tokenizer, loss_on), [f"row {number + 1} of {name}" for number in numbers]
    if kind == "rollout":
        documents, rollouts = encoder.encode_rollouts(rows, names)
        flat = [value for each in rollouts for value in each.old_logps or ()]
        old_logps = _lists(pa.array(flat, pa.float32()), [len(ids) for ids, _ in documents])
        advantages = pa.array([each.advantage for each in rollouts], pa.float64())
        return _table(documents).append_column(ADVANTAGES, advantages).append_column(OLD_LOGPS, old_logps)
    if kind == "labelled":
        documents, labels = encoder.encode_labelled(rows, names)
        return _table(documents).append_column(LABEL, pa.array(labels, pa.bool_()))
    return _table(encoder.encode(rows, names))


def _table(documents: Sequence[Learned]) -> pa.Table:
    lengths = [len(ids) for ids, _ in documents]
    ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in documents)])
    learned = np.concatenate([np.zeros(0, bool), *(each for _, each in documents)])
    return pa.table({INPUT_IDS: _lists(pa.array(ids), lengths), LEARNED: _lists(pa.array(learned), lengths)})


def _lists(values: pa.Array, lengths: list[int]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths], dtype=np.int32)), values)


def _texts(rows: pa.Table) -> Iterator[Text]:
    for row in rows[TEXT]:
        text = row.as_buffer()
        if text is not None and len(text) > 0:
            yield memoryview(text)


def _strings(rows: pa.Table) -> Iterator[Text]:
    """All that is text in the rows."""
    if TEXT in rows.column_names:
        yield from _texts(rows)
    elif INPUT_IDS not in rows.column_names:
        yield from (text.encode() for row in rows_of(rows) for text in strings_in(row))


@lru_cache(maxsize=1)
def _text_encoder(tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    return TextEncoder(tokenizer)


@lru_cache(maxsize=1)
def _row_encoder(tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> RowEncoder:
    return RowEncoder(tokenizer, loss_on)


@contextmanager
def _one_process_at_a_time(documents: Dataset) -> Iterator[None]:
    """The first rank to come does the work, the others find it in the cache; no process group is needed."""
    if not documents.cache_files:  # in memory: nothing to share
        yield
        return
    with FileLock(Path(documents.cache_files[0]["filename"]).with_name("tokenise.lock")):
        yield
