"""Chats to token ids, and which of them are learned."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from mst_ds.config import LossOn
from mst_ds.data.chat_template import ChatTemplate, Span, strings_in, with_strings
from mst_ds.data.text_encoder import BYTES_PER_CALL, NEVER_IN_TEXT, control_tokens, renamed_backend
from mst_ds.rows.chats import Chat

Learned = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""The ids of a document, and whether each is learned."""


@dataclass(frozen=True)
class _Written:
    """What a template wrote, in the letters that the backend takes.

    spans: learned characters. prompts: characters from the last control token before a span to where it begins, which
    must have the same ids alone as here; empty where the template itself marks spans.
    """

    where: str
    text: str
    spans: list[Span]
    prompts: list[Span]


class ChatEncoder:
    """Token ids of chats.

    A chat is what the template writes, without anything before or behind it. The control tokens in it that the template
    wrote are control tokens, and those that are spelled out in a message are the ids of their letters: messages are
    rendered with `NEVER_IN_TEXT` inside of each control token that they spell out, so that those which are whole
    afterwards are the template's. These alone are named so that the backend finds them.

    Raises:
        ValueError: the tokenizer has no chat template, or is none of the fast ones, which know where a token stands.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> None:
        self._template = ChatTemplate(tokenizer)
        self._loss_on: LossOn = loss_on
        control = control_tokens(tokenizer)
        renamed = renamed_backend(tokenizer, control)
        if renamed is None:
            raise ValueError(
                f"the dataset has chats, but {type(tokenizer).__name__} does not say where in a text its tokens stand; "
                "allowed: --tokenizer with a fast one, of the library tokenizers"
            )
        self._backend, hidden = renamed
        for id, token in control.items():
            if token in hidden and self._backend.token_to_id(token + NEVER_IN_TEXT) != id:
                raise ValueError(
                    f"the tokenizer {tokenizer.name_or_path!r} has {token!r} not as a special token of its own; "
                    "allowed: for chats one whose control tokens are all special"
                )
        self._never_plain = sorted(set(control.values()) - hidden)
        # The longest first, as the tokenizer has it where one is the beginning of another.
        longest = sorted(hidden, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest)) or r"(?!)")

    def encode(self, chats: Sequence[tuple[Chat, str]]) -> Iterator[Learned]:
        """Of each chat, given with what names its row for a message.

        Raises:
            ValueError: what is learned cannot be told exactly; see `ChatTemplate` and `_border`.
        """
        group: list[_Written] = []
        length = 0
        for chat, where in chats:
            group.append(self._written(chat, where))
            length += len(group[-1].text)
            if length > BYTES_PER_CALL:
                yield from self._encode_group(group)
                group, length = [], 0
        yield from self._encode_group(group)

    def _encode_group(self, group: Sequence[_Written]) -> Iterator[Learned]:
        texts = [written.text for written in group]
        prompts = [written.text[start:end] for written in group for start, end in written.prompts]
        encodings: list[Encoding] = self._backend.encode_batch(texts + prompts, add_special_tokens=False)
        of_prompts = iter(encodings[len(texts) :])
        for written, encoding in zip(group, encodings, strict=False):
            yield _learned(written, encoding, [next(of_prompts) for _ in written.prompts])

    def _written(self, chat: Chat, where: str) -> _Written:
        guarded = self._guarded(chat, where)
        text = self._template.text(guarded, where)
        if guarded is not chat and text.replace(NEVER_IN_TEXT, "") != self._template.text(chat, where):
            raise ValueError(
                f"{where} spells out {self._spelled(chat)!r}, a control token by which the chat template decides what "
                "it writes; allowed: chats without it, such as reasoning in 'reasoning_content' and not in 'content'"
            )
        spans = self._template.spans(guarded, text, self._loss_on, where)
        letters = _Letters(text, self._control)
        moved = [(letters.place(start), letters.place(end)) for start, end in spans]
        prompts = []
        if self._template.asks_for(self._loss_on, chat):
            prompts = [(letters.control_before(start), letters.place(start)) for start, _ in spans]
        return _Written(where, letters.text, moved, prompts)

    def _guarded(self, chat: Chat, where: str) -> Chat:
        """The chat with `NEVER_IN_TEXT` inside of control tokens that it spells out; itself, where it has none."""
        found = 0

        def guard(text: str) -> str:
            nonlocal found
            if NEVER_IN_TEXT in text:
                raise ValueError(f"{where} has U+FDD0, which is no character; allowed: text")
            for token in self._never_plain:
                if token in text:
                    raise ValueError(
                        f"{where} spells out {token!r}, which the tokenizer takes for its control token and not for "
                        "text; allowed: chats without it"
                    )
            guarded, times = self._control.subn(lambda token: token[0][0] + NEVER_IN_TEXT + token[0][1:], text)
            if times and self._control.search(guarded):
                raise ValueError(f"{where} spells out control tokens that overlap, {text[:60]!r}; allowed: single ones")
            found += times
            return guarded

        guarded = replace(chat, messages=with_strings(chat.messages, guard), tools=with_strings(chat.tools, guard))
        return guarded if found else chat

    def _spelled(self, chat: Chat) -> str:
        """The first control token that the chat spells out."""
        strings = strings_in([chat.messages, chat.tools])
        return next(found[0] for text in strings for found in self._control.finditer(text))


class _Letters:
    """What a template wrote, with `NEVER_IN_TEXT` taken out of messages and put behind control tokens."""

    def __init__(self, text: str, control: re.Pattern[str]) -> None:
        parts: list[str] = []
        # From character `_from[n]` on, characters are moved by `_by[n]`.
        self._from, self._by = [0], [0]
        # Where control tokens begin in `text` as it was, and end.
        self._controls: list[Span] = []
        last = 0
        for found in re.finditer(f"{NEVER_IN_TEXT}|{control.pattern}", text):
            is_guard = found[0] == NEVER_IN_TEXT
            parts += [text[last : found.start()], "" if is_guard else found[0] + NEVER_IN_TEXT]
            last = found.end()
            self._from.append(last)
            self._by.append(self._by[-1] + (-1 if is_guard else 1))
            if not is_guard:
                self._controls.append(found.span())
        self.text = "".join([*parts, text[last:]])

    def place(self, character: int) -> int:
        """Where a character, or the border before it, is in `text`."""
        return character + self._by[bisect_right(self._from, character) - 1]

    def control_before(self, character: int) -> int:
        """Where in `text` the last control token begins that ends before this border; the beginning, without one."""
        number = bisect_right(self._controls, character, key=lambda span: span[1]) - 1
        return 0 if number < 0 else self.place(self._controls[number][0])


def _learned(written: _Written, encoding: Encoding, prompts: Sequence[Encoding]) -> Learned:
    ids = np.array(encoding.ids, dtype=np.int32)
    starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    learned = np.zeros(len(ids), dtype=bool)
    borders = [_border(written, starts, ends, place) for span in written.spans for place in span]
    for begin, end in zip(borders[::2], borders[1::2], strict=True):
        learned[begin:end] = True
    for begin, (first, place), alone in zip(borders[::2], written.prompts, prompts, strict=False):
        here = ids[int(np.searchsorted(ends, first, side="right")) : begin]
        if here.tolist() != alone.ids:
            raise ValueError(_no_border(written, place))
    return ids, learned


def _border(written: _Written, starts: NDArray[np.int64], ends: NDArray[np.int64], place: int) -> int:
    """The number of tokens before the border at character `place`.

    Raises:
        ValueError: a token lies across it.
    """
    number = int(np.searchsorted(ends, place, side="right"))
    if number < len(starts) and starts[number] < place:
        raise ValueError(_no_border(written, place))
    return number


def _no_border(written: _Written, place: int) -> str:
    before, after = (
        part.replace(NEVER_IN_TEXT, "")
        for part in (written.text[max(0, place - 30) : place], written.text[place:][:30])
    )
    return (
        f"{written.where} has no border between tokens where what is learned begins or ends, after {before!r} and "
        f"before {after!r}; allowed: text whose tokens end there; nearest: no white space where an answer begins"
    )
