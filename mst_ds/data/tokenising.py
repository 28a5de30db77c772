"""Documents to token ids, in a file that every rank finds again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Sequence, Value
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from mst_ds.data.batching import documents_at_once
from mst_ds.data.long_texts import Text
from mst_ds.data.text_encoder import TextEncoder, control_tokens_in
from mst_ds.dataset_files import TEXT

# What a chat template has written has control tokens from the first document on.
_DOCUMENTS_LOOKED_AT = 16


def tokenise(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids, one row per document in the one column "input_ids" (int32), as `TextEncoder` makes them.

    Rows without text are left out. The result is an Arrow file in the cache of `datasets`, found again by the
    fingerprints of the documents and of the tokenizer. Memory is some hundred MiB and up to twice that of
    the longest document's ids, if the tokenizer can be used on parts of a text (see `long_texts`).

    Raises:
        ValueError: text that is not UTF-8, or that the tokenizer cannot but take for control tokens.
    """
    table = documents.with_format("arrow")
    # What reading them took, up to some times a text, Arrow keeps for later: it would lie beside the ids.
    pa.default_memory_pool().release_unused()
    try:
        with _one_process_at_a_time(documents):
            tokens = table.map(
                _encode,
                batched=True,
                batch_size=documents_at_once(pc.binary_length(table[:][TEXT]).fill_null(0).to_numpy()),
                fn_kwargs={"tokenizer": tokenizer},
                remove_columns=documents.column_names,
                features=Features({"input_ids": Sequence(Value("int32"))}),
                desc="Tokenising",
            )
    except UnicodeDecodeError as error:
        raise ValueError(f"a document of the dataset is not UTF-8 text ({error}); allowed: UTF-8") from error
    return tokens.with_format(None)


def letters_warning(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A warning, in one line, where the first documents spell out control tokens; None where they do not."""
    first = documents.with_format("arrow")[:_DOCUMENTS_LOOKED_AT]
    if not (found := control_tokens_in(_texts(first), tokenizer)):
        return None
    return (
        f"warning: documents spell out {', '.join(map(repr, found[:3]))}, control tokens of the tokenizer, which are "
        "only letters in a text: what a chat template has written is not trained as the chat it stands for"
    )


def _encode(rows: pa.Table, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    ids, lengths = _text_encoder(tokenizer).encode(_texts(rows))
    offsets = np.cumsum([0, *lengths], dtype=np.int32)
    values = pa.Array.from_buffers(pa.int32(), len(ids), [None, pa.py_buffer(ids)])
    return pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), values)})


def _texts(rows: pa.Table) -> Iterator[Text]:
    for row in rows[TEXT]:
        text = row.as_buffer()
        if text is not None and len(text) > 0:
            yield memoryview(text)


@lru_cache(maxsize=1)
def _text_encoder(tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    return TextEncoder(tokenizer)


@contextmanager
def _one_process_at_a_time(documents: Dataset) -> Iterator[None]:
    """The first rank to come does the work, the others find it in the cache; no process group is needed."""
    if not documents.cache_files:  # in memory: nothing to share
        yield
        return
    with FileLock(Path(documents.cache_files[0]["filename"]).with_name("tokenise.lock")):
        yield
