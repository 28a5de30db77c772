"""What a tokenizer makes of a document: how it begins and ends, and that nothing in its text is control."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mst_ds.data.long_texts import WINDOW, Text, Windows

# A fast tokenizer takes up to some 600 bytes a token while it encodes a text.
BYTES_PER_CALL = 2**20
# Not a character: no text that is exchanged has it.
NEVER_IN_TEXT = "\ufdd0"
# Of a document, for `control_tokens_in`.
_BYTES_LOOKED_AT = 2**16
# How a vocabulary of pieces names the bytes of characters that it does not have.
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class TextEncoder:
    """Token ids of documents.

    A document begins as the tokenizer begins a text (Llama 3, Gemma and Mistral with BOS, Qwen and GPT-2 with nothing)
    and ends with EOS, once. In between is text: a control token spelled out there ("a log of <eos>") gives the ids of
    its letters. Added tokens that are not special stay what they are to the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.prefix = _prefix(tokenizer)
        self._control = control_tokens(tokenizer)
        self._backend = text_backend(tokenizer, self._control)
        self._windows = None if self._backend is None else Windows(self._backend)

    def encode(self, texts: Iterable[Text]) -> tuple[array[int], list[int]]:
        """The ids (int32) of all documents, one after the other, and the number of ids of each.

        Raises:
            UnicodeDecodeError: a text is not UTF-8.
            ValueError: the tokenizer reads a control token where a text spells it out, and cannot do otherwise.
        """
        ids: array[int] = array("i")
        ends = [0]
        for group in _groups(texts):
            for _ in self._encode_group(ids, group):
                self.require_text(ids, ends[-1] + len(self.prefix))
                ids.append(self._tokenizer.eos_token_id)
                ends.append(len(ids))
        return ids, np.diff(ends).tolist()

    def _encode_group(self, ids: array[int], group: Sequence[Text]) -> Iterator[None]:
        """Appends to `ids` a document without its EOS, and the next after each yield."""
        if len(group) == 1 and _is_long(group[0]) and self._windows is not None and self._windows.can_cut:
            ids.extend(self.prefix)
            self._windows.encode(ids, group[0])
            yield
            return
        for of_text in self.encode_whole([str(text, "utf-8") for text in group]):
            ids.extend(self.prefix)
            ids.extend(of_text)
            yield

    def encode_whole(self, texts: list[str]) -> Iterator[list[int]]:
        """The ids of each text, as one, and nothing before or behind them."""
        if self._backend is not None:
            yield from (each.ids for each in self._backend.encode_batch(texts, add_special_tokens=False))
            return
        options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
        if type(self._tokenizer).__name__ != "MistralCommonBackend":  # which knows only text, and no such option
            options["split_special_tokens"] = True
        for text in texts:
            yield self._tokenizer(text, **options)["input_ids"]

    def require_text(self, ids: Sequence[int], start: int = 0) -> None:
        """Refuse a document whose text, from `start` on, has control tokens."""
        control = np.array(sorted(self._control), dtype=np.int32)
        for first in range(start, len(ids), BYTES_PER_CALL):
            part = np.array(ids[first : first + BYTES_PER_CALL], dtype=np.int32)
            found = part[np.isin(part, control)]
            if len(found):
                raise ValueError(
                    f"a document of the dataset spells out {self._control[int(found[0])]!r}, which the tokenizer takes "
                    "for its control token and not for text; allowed: documents without it"
                )


def control_tokens_in(texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The control tokens that the beginnings of these texts spell out, which are letters there."""
    beginnings = [str(text[:_BYTES_LOOKED_AT], "utf-8", "ignore") for text in texts]
    return [token for token in control_tokens(tokenizer).values() if any(token in text for text in beginnings)]


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text. What it puts behind one, as EOS, is left to us."""
    probe = "a"
    bare: list[int] = tokenizer(probe, add_special_tokens=False)["input_ids"]
    dressed: list[int] = tokenizer(probe, add_special_tokens=True)["input_ids"]
    for start in range(len(dressed) - len(bare) + 1):
        if bare and dressed[start : start + len(bare)] == bare:
            return dressed[:start]
    return []


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """By id. A single character, as "!" for padding, is a letter first; bytes and what is unknown are text."""
    special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {
        id: token
        for id, token in special.items()
        if len(token) > 1 and id != tokenizer.unk_token_id and not _BYTE.fullmatch(token)
    }


def text_backend(tokenizer: PreTrainedTokenizerBase, control: Mapping[int, str]) -> Tokenizer | None:
    """A fast tokenizer's backend that gives the ids of a text alone, or None where there is no such backend.

    `encode_special_tokens` keeps special tokens from being searched in a text. But a Unigram model has them among its
    pieces, and a model of whole words among its words: there they get names that no text has, see `renamed_backend`.
    """
    renamed = renamed_backend(tokenizer, control)
    if renamed is None:
        return None
    backend, _ = renamed
    backend.encode_special_tokens = True
    return backend


def renamed_backend(
    tokenizer: PreTrainedTokenizerBase, control: Mapping[int, str]
) -> tuple[Tokenizer, set[str]] | None:
    """A fast tokenizer's backend whose control tokens are found in a text only where `NEVER_IN_TEXT` follows them, and
    which of them are; the others are what merging letters can give. None where there is no such backend."""
    if not tokenizer.is_fast:
        return None
    try:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception:  # tokenizers raises this type itself, for parts written in Python
        return None
    parts |= {"truncation": None, "padding": None, "post_processor": None}
    model = parts["model"]
    merged = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in model.get("merges", [])}
    hidden = {token for token in control.values() if token not in merged and token != model.get("unk_token")}
    new_names = {token: token + NEVER_IN_TEXT for token in hidden}
    if model["type"] == "Unigram":
        model["vocab"] = [[new_names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {new_names.get(piece, piece): id for piece, id in model["vocab"].items()}
    for token in parts["added_tokens"]:
        if token["special"]:
            token["content"] = new_names.get(token["content"], token["content"])
    return Tokenizer.from_str(json.dumps(parts)), hidden


def _groups(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Texts for one call each: a long one alone, short ones together."""
    group: list[Text] = []
    length = 0
    for text in texts:
        if group and (_is_long(text) or length + len(text) > BYTES_PER_CALL):
            yield group
            group, length = [], 0
        group.append(text)
        length += len(text)
        if _is_long(text):
            yield group
            group, length = [], 0
    if group:
        yield group


def _is_long(text: Text) -> bool:
    return len(text) > 2 * WINDOW
