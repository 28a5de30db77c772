"""Documents to tokens to samples of equal length, without ever holding all tokens in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.utils.data
from datasets import Dataset, Features, Sequence, Value
from filelock import FileLock
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from mst_ds.data.documents import TEXT
from mst_ds.data.order import permutation
from mst_ds.data.sharding import IGNORE_INDEX, Batch

# Documents per call of the tokenizer. Its Python lists of ids take some 36 bytes a token, and a document can
# have a million tokens.
_DOCUMENTS_PER_CALL = 32


def tokenise(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids, one row per document in the one column "input_ids" (int32), each ended by the EOS token.

    Rows without text are left out. The result is an Arrow file in the cache of `datasets`, found again by the
    fingerprints of the documents and of the tokenizer.

    Raises:
        ValueError: text that is not UTF-8.
    """
    try:
        with _one_process_at_a_time(documents):
            return documents.map(
                _encode,
                batched=True,
                batch_size=_DOCUMENTS_PER_CALL,
                fn_kwargs={"tokenizer": tokenizer},
                remove_columns=documents.column_names,
                features=Features({"input_ids": Sequence(Value("int32"))}),
                desc="Tokenising",
            )
    except UnicodeDecodeError as error:
        raise ValueError(f"a document of the dataset is not UTF-8 text ({error}); allowed: UTF-8") from error


def _encode(rows: dict[str, list[str | None]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
    texts = [text for text in rows[TEXT] if text]
    if not texts:
        return {"input_ids": []}
    # verbose=False: a document longer than the model's longest input is no mistake, it is cut into samples.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return {"input_ids": [np.array([*ids, tokenizer.eos_token_id], dtype=np.int32) for ids in encoded["input_ids"]]}


@contextmanager
def _one_process_at_a_time(documents: Dataset) -> Iterator[None]:
    """The first rank to come does the work, the others find it in the cache; no process group is needed."""
    if not documents.cache_files:  # in memory: nothing to share
        yield
        return
    with FileLock(Path(documents.cache_files[0]["filename"]).with_name("tokenise.lock")):
        yield


def document_lengths(tokens: Dataset) -> NDArray[np.int64]:
    """The number of tokens of each row of `tokens`, from the Arrow offsets alone."""
    column = tokens.with_format("arrow")[:]["input_ids"]
    return pc.list_value_length(column).to_numpy().astype(np.int64)


def split_documents(
    tokens: Dataset, num_samples: int, seq_len: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Parts whole documents, at random, into a training and a held-out part.

    Args:
        tokens: the result of `tokenise`.
        num_samples: held-out samples of `seq_len` tokens; the held-out documents have tokens for all.

    Returns:
        The row numbers in `tokens` of the training and of the held-out documents, each ascending.

    Raises:
        ValueError: no document is left for training.
    """
    lengths = document_lengths(tokens)
    if num_samples == 0:
        return np.arange(len(lengths)), np.arange(0)
    order = permutation(len(lengths), seed)
    num_held_out = int(np.searchsorted(np.cumsum(lengths[order]), num_samples * seq_len)) + 1
    if num_held_out >= len(lengths):
        raise ValueError(
            f"eval_samples is {num_samples} of {seq_len} tokens, but the dataset has {lengths.sum()} "
            f"in {len(lengths)} document(s), and holding whole documents out leaves none for training; "
            "allowed: fewer eval_samples, a shorter seq_len, or eval_steps 0"
        )
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


class PackedDataset(torch.utils.data.Dataset[Batch]):
    """The tokens of the given documents, one after the other, cut into samples of `seq_len` tokens.

    The last sample holds what is left and is filled up with padding, so every token is in exactly one sample.
    Samples are read from the memory-mapped Arrow file as they are asked for; only document lengths are held.

    Args:
        tokens: the result of `tokenise`.
        seq_len: S, in tokens.
        pad_id: the id on padding, where the label is `IGNORE_INDEX`.
        documents: row numbers in `tokens`; default: all.
        max_samples: samples after this many are left out; default: none.

    Raises:
        ValueError: the documents have fewer than `seq_len` tokens.
    """

    def __init__(
        self,
        tokens: Dataset,
        seq_len: int,
        pad_id: int,
        documents: NDArray[np.int64] | None = None,
        max_samples: int | None = None,
    ) -> None:
        lengths = document_lengths(tokens)
        self.seq_len = seq_len
        self.pad_id = pad_id
        self._rows = tokens.with_format("arrow")
        self._documents = np.arange(len(lengths)) if documents is None else documents
        # Document d of `_documents` is tokens [ends[d - 1], ends[d]) of the packed stream.
        self._ends = np.cumsum(lengths[self._documents])
        self.num_tokens = int(self._ends[-1]) if len(self._ends) else 0
        if self.num_tokens < seq_len:
            raise ValueError(
                f"seq_len is {seq_len}, but the dataset has {self.num_tokens} tokens, not enough for one "
                f"sequence; allowed: a seq_len up to {self.num_tokens}, or a larger dataset"
            )
        num_samples = -(-self.num_tokens // seq_len)
        self._num_samples = num_samples if max_samples is None else min(num_samples, max_samples)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Batch:
        """{"input_ids": (S,) int64, "labels": (S,) int64}: the labels are the ids, not shifted."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = index * self.seq_len
        ids = torch.from_numpy(self._read(start, min(start + self.seq_len, self.num_tokens)))
        padding = (0, self.seq_len - len(ids))
        return {
            "input_ids": torch.nn.functional.pad(ids, padding, value=self.pad_id),
            "labels": torch.nn.functional.pad(ids, padding, value=IGNORE_INDEX),
        }

    def _read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of the packed stream."""
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        rows = self._rows[self._documents[first : last + 1].tolist()]["input_ids"]
        # Views of the file: of a long document only the tokens of this sample are copied.
        stream = pa.chunked_array([row.flatten() for row in rows.chunks])
        before = int(self._ends[first - 1]) if first else 0
        return stream.slice(start - before, stop - start).to_numpy().astype(np.int64)
