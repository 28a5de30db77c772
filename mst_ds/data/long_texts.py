"""Texts too long for one call of the tokenizer: encoded in windows that overlap, joined where the windows agree.

A fast tokenizer takes several hundred bytes a token while it encodes a text. Windows bound that, but must give the ids
of the whole text. Where two windows overlap both give the same tokens over a stretch, and a border in it is where the
left window's tokens end and the right one's go on. Why that is exact:

- Normalisers act on a character and the marks that follow it. Beyond a character that never combines with what is
  before it, the edge of a window changes nothing; there has to be one on each side of the border.
- Splitters by kind of character (`_BY_CHARACTER`) look at two neighbours. A pattern is matched from left to right
  and never looks behind (`repeated_classes` refuses those that do), so what follows a border depends on the text after
  it alone. What precedes it was matched without sight of the window's end (`_matches_end_within`). So a border that
  both windows have between two words is one of the whole text, and each word is encoded by itself.
- Byte-pair encoding merges the pair of lowest rank, the leftmost of equals, until none is left. Whether a merge ever
  crosses the border of two tokens depends on the characters of these two alone: until one does, the parts on both
  sides go their own ways, in an order that is the same with the rest and without. So two neighbouring tokens that
  both windows have are neighbours in the whole text, even inside a word. Other models need the border of a word.

Windows that do not agree, as on a million times the same letter, are encoded together as one, in the worst case the
whole text. A tokenizer with a part that is not named here encodes each text as a whole.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

from tokenizers import Encoding, Regex, Tokenizer
from tokenizers.pre_tokenizers import Split

Text: TypeAlias = "bytes | memoryview"
"""In UTF-8: a `str` takes four bytes a character as soon as one of them needs four."""

WINDOW = 2**17
"""Bytes of a text from one overlap to the next."""
OVERLAP = 2**13
"""Bytes that two windows share."""
_WINDOWS_PER_CALL = 4

_NORMALISERS = {
    *("BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend"),
    *("Replace", "Strip", "StripAccents"),
}
_BY_CHARACTER = {"BertPreTokenizer", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation", "WhitespaceSplit"}
_WHITESPACE = r"\w+|[^\w\s]+"
_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Characters that no normal form joins to the one before them: up to the combining marks, and common ones of CJK.
_STABLE = re.compile("[\0-\u02ff\u3001\u3002\u4e00-\u9fff]")
# Longer ones could lie across an overlap.
_LONGEST_ADDED_TOKEN = 256


class _Tokens(NamedTuple):
    """Neighbours, a number of each kind for every one. A text has as many of these as windows: 13 bytes a token."""

    ids: array[int]
    starts: array[int]  # in characters of the overlap
    ends: array[int]
    begins_word: bytes


class Windows:
    """How the texts of one tokenizer are cut.

    Args:
        backend: gives the ids of a text, without anything before or behind it.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        parts = json.loads(backend.to_str())
        normalisers = _flat(parts["normalizer"], "normalizers")
        splitters = _flat(parts["pre_tokenizer"], "pretokenizers")
        patterns = [pattern for part in (*normalisers, *splitters) if (pattern := _pattern(part)) is not None]
        repeated = [repeated_classes(pattern) for pattern in patterns]
        self._removers = [Split(Regex(f"(?i:{each})"), "removed") for classes in repeated for each in classes or ()]
        self._within_words = parts["model"]["type"] == "BPE" and not any(map(_pattern, splitters))
        self.can_cut = (
            all(part["type"] in _NORMALISERS for part in normalisers)
            and all(part["type"] in _BY_CHARACTER | {"ByteLevel", "Split", "Whitespace"} for part in splitters)
            # Behind these a pattern sees other characters than the text has.
            and not any(
                first["type"] in ("ByteLevel", "Metaspace") and _pattern(then)
                for number, first in enumerate(splitters)
                for then in splitters[number + 1 :]
            )
            and None not in repeated
            and all(len(token["content"]) <= _LONGEST_ADDED_TOKEN for token in parts["added_tokens"])
            and not parts["model"].get("dropout")
        )

    def encode(self, ids: array[int], text: Text) -> None:
        """Appends to `ids` those of the whole text.

        Raises:
            UnicodeDecodeError: `text` is not UTF-8.
        """
        first = len(ids)
        windows = _Encoded(text, self._backend)
        joints: list[_Joint] = []
        start, stop = 0, 1
        while True:
            encoding = windows[start, stop]
            begin = 0
            if start > 0:
                joint = joints[-1]
                begin, tokens = _middle(encoding, 0, len(joint.overlap))
                cut = self._cut(joint.tokens, tokens, joint.overlap)
                if cut is None:
                    # Together with the window before, and twice as long: all encoding again is a few times the text.
                    joints.pop()
                    start, stop = joint.start, min(windows.count, max(stop, 2 * start - joint.start))
                    continue
                del ids[joint.position + cut :]
                begin += cut
            else:
                del ids[first:]
            ids.extend(encoding.ids[begin:])
            if stop == windows.count:
                return
            overlap = windows.overlap(stop)
            length = len(windows.text(start, stop))
            at, tokens = _middle(encoding, length - len(overlap), len(overlap))
            joints.append(_Joint(start, overlap, tokens, len(ids) - (len(encoding.ids) - at)))
            start, stop = stop, stop + 1

    def _cut(self, left: _Tokens, right: _Tokens, overlap: str) -> int | None:
        """The number of tokens to take from the left window, or None where the windows may not be parted here."""
        if left != right:
            return None
        places = [place for place in range(1, len(left.ids)) if self._within_words or left.begins_word[place]]
        if not places:
            return None
        place = places[len(places) // 2]
        before, after = overlap[: left.starts[place - 1]], overlap[left.ends[place] :]
        stable = _STABLE.search(before) and _STABLE.search(after)
        return place if stable and self._matches_end_within(after) else None

    def _matches_end_within(self, text: str) -> bool:
        """Whether no match of a pattern that begins before `text` can reach beyond it.

        A match is at most every repeated class once, with a few characters between them. Where each class fails in each
        part of the text, a class that begins in one part has ended in the next.
        """
        normaliser = self._backend.normalizer
        for seen in {text, text if normaliser is None else normaliser.normalize_str(text)}:
            parts = 2 * len(self._removers) + 1
            length = len(seen) // parts
            for start in range(0, parts * length, length or 1):
                if not all(remover.pre_tokenize_str(seen[start : start + length]) for remover in self._removers):
                    return False
        return True


class _Joint(NamedTuple):
    """Where a window ends: what of it the next one has to agree with."""

    start: int  # of the window
    overlap: str
    tokens: _Tokens
    position: int  # of the first of `tokens` among the ids


class _Encoded:
    """A text's windows, encoded as they are asked for, several at once."""

    def __init__(self, text: Text, backend: Tokenizer) -> None:
        self._text = memoryview(text)
        self._backend = backend
        self.count = max(1, len(text) // WINDOW)
        self._ahead: dict[int, Encoding] = {}

    def __getitem__(self, windows: tuple[int, int]) -> Encoding:
        start, stop = windows
        if stop - start > 1:
            return self._backend.encode(self.text(start, stop), add_special_tokens=False)
        if start not in self._ahead:
            numbers = range(start, min(start + _WINDOWS_PER_CALL, self.count))
            texts = [self.text(number, number + 1) for number in numbers]
            self._ahead = {}  # before the next are made: each takes several hundred bytes a token
            encodings = self._backend.encode_batch(texts, add_special_tokens=False)
            self._ahead = dict(zip(numbers, encodings, strict=True))
        return self._ahead[start]

    def text(self, start: int, stop: int) -> str:
        """Of windows [start, stop), with the overlaps on both sides."""
        return self._decode(self._edge(start, -OVERLAP // 2), self._edge(stop, OVERLAP // 2))

    def overlap(self, number: int) -> str:
        """What windows `number - 1` and `number` share."""
        return self._decode(self._edge(number, -OVERLAP // 2), self._edge(number, OVERLAP // 2))

    def _edge(self, number: int, offset: int) -> int:
        if number == 0:
            return 0
        if number == self.count:
            return len(self._text)
        edge = number * WINDOW + offset
        while self._text[edge] & 0xC0 == 0x80:  # inside a character
            edge -= 1
        return edge

    def _decode(self, start: int, stop: int) -> str:
        return str(self._text[start:stop], "utf-8")


def _middle(encoding: Encoding, start: int, length: int) -> tuple[int, _Tokens]:
    """The tokens in the middle half of the overlap at characters [start, start + length), after the first's number."""

    def span(number: int) -> tuple[int, int]:
        # None is for tokens that stand for no text, which are not asked for.
        return encoding.token_to_chars(number) or (0, 0)

    first, last = (
        bisect_left(range(len(encoding)), start + length * quarter // 4, key=lambda number: span(number)[0])
        for quarter in (1, 3)
    )
    words = [encoding.token_to_word(number) if number >= 0 else None for number in range(first - 1, last)]
    spans = [span(number) for number in range(first, last)]
    tokens = _Tokens(
        ids=array("i", encoding.ids[first:last]),
        starts=array("i", [begins - start for begins, _ in spans]),
        ends=array("i", [ends - start for _, ends in spans]),
        begins_word=bytes(word != before for before, word in pairwise(words)),
    )
    return first, tokens


def _flat(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The parts of a sequence, which may hold sequences."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [each for member in part[inner] for each in _flat(member, inner)]


def _pattern(part: Mapping[str, Any]) -> str | None:
    """The pattern that a normaliser or splitter searches for, if it sees more than a character and its neighbour."""
    if part["type"] == "Whitespace":
        return _WHITESPACE
    if part["type"] == "ByteLevel" and part.get("use_regex", "normaliser") is True:
        return _BYTE_LEVEL
    searched = part.get("pattern", {})
    literal = searched.get("String", "")
    return searched.get("Regex", re.escape(literal) if len(literal) > 1 else None)


# What a pattern may consist of. No ^, \b, \G, no look behind and no reference back: they depend on what came before.
_SYNTAX = re.compile(
    r"""(?P<open> \((?: \?(?: [:>=!] | i: ) | (?!\?) ) )
    |   (?P<close> \) )
    |   (?P<either> \| | \$ )
    |   (?P<quantifier> (?: [*+?] | \{(?P<least>\d+)(?P<comma>,(?P<most>\d*))?\} ) (?P<again>[+?]?) )
    |   (?P<atom> \\[pP]\{[^}]*\} | \\x\{[0-9A-Fa-f]+\} | \\x[0-9A-Fa-f]{2} | \\u[0-9A-Fa-f]{4}
            | \\[dDhHsSwWnrtfv] | \\[^\w] | [^\\\[\]^(){}] )
    """,
    re.VERBOSE,
)
_FEW = 8


def repeated_classes(pattern: str) -> list[str] | None:
    """The classes of characters that the pattern repeats without an end, or None for one that is not understood."""
    found: list[str] = []
    atom: str | None = None
    position = 0
    while position < len(pattern):
        if pattern[position] == "[":
            end = _end_of_class(pattern, position)
            if end is None:
                return None
            atom, position = pattern[position:end], end
            continue
        match = _SYNTAX.match(pattern, position)
        if match is None:
            return None
        position = match.end()
        if match["quantifier"] is None:
            atom = match["atom"]
            continue
        most = match["most"] if match["comma"] else match["least"]
        if atom is None and match[0][0] == "{":
            return None
        # After braces a plus repeats once more, as in Ruby.
        endless = match[0][0] in "*+"
        if match[0][0] == "{":
            endless = match["again"] == "+" or not most or int(most) > _FEW
        if endless and atom is None:
            return None
        if endless:
            found.append(str(atom))
        atom = None
    return found


def _end_of_class(pattern: str, start: int) -> int | None:
    """Behind the bracket that closes the one at `start`."""
    depth, position = 0, start
    while position < len(pattern):
        character = pattern[position]
        depth += (character == "[") - (character == "]")
        position += 2 if character == "\\" else 1
        if depth == 0:
            return position
    return None
