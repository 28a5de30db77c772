from __future__ import annotations

import random
import tracemalloc
from array import array
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from small_tokenizers import DEEPSEEK, KINDS, LLAMA_3, small_tokenizer
from tokenizers import Encoding, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mst_ds.data import long_texts, text_encoder
from mst_ds.data.long_texts import Windows, repeated_classes
from mst_ds.data.text_encoder import TextEncoder

WINDOW, OVERLAP = 1024, 256
LETTERS = "etaoin shrdlu ,.\n"


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "WINDOW", WINDOW)
    monkeypatch.setattr(long_texts, "OVERLAP", OVERLAP)


def hostile(seed: int) -> str:
    """Stretches longer and shorter than an overlap of what tokenizers treat each in a way of its own."""
    pick = random.Random(seed)
    kinds: list[Callable[[int], str]] = [
        lambda length: "".join(pick.choices(LETTERS, k=4 * length)),
        lambda length: "".join(pick.choices(LETTERS, k=4 * length)),
        lambda length: " " * length,
        lambda length: "a" * length,
        lambda length: "".join(pick.choices("abc", k=2 * length)),
        lambda length: "1234567890"[: length % 10] * (length // 10),
        lambda length: "=-" * (length // 2),
        lambda length: "\r\n" * (length // 8) + "\t \n\n" * (length // 8),
        lambda length: "ab  ba" * (length // 12) + "<eos> <bos><think></s>" * 3,
        lambda length: "e\u0301\u0323\ufb01" * (length // 8) + "\u1112\u1161\u11ab\ud55c\u11a8" * (length // 16),
        lambda length: "🎉👩‍👩‍👧" * (length // 32) + "你好世界。" * (length // 8),
        lambda length: "".join(chr(pick.choice([pick.randrange(32, 0x3000), 0x1F600])) for _ in range(length // 4)),
    ]
    return "".join(pick.choice(kinds)(pick.randrange(2 * OVERLAP)) for _ in range(60))


class Counting:
    """A backend that notes how many bytes of text each call was given, and how many the longest text had."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        self.bytes_of_calls: list[int] = []
        self.longest = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.backend, name)

    def encode(self, text: str, **options: object) -> Encoding:
        return self.encode_batch([text], **options)[0]

    def encode_batch(self, texts: list[str], **options: object) -> list[Encoding]:
        lengths = [len(text.encode()) for text in texts]
        self.bytes_of_calls.append(sum(lengths))
        self.longest = max(self.longest, *lengths)
        return list(self.backend.encode_batch(texts, **options))


def joined(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[int], int]:
    """The ids by windows and of the whole text, and the bytes of the longest windows that were not parted."""
    backend = Counting(tokenizer.backend_tokenizer)
    windows = Windows(backend)
    assert windows.can_cut
    ids = array("i", [7])
    windows.encode(ids, text.encode())
    assert ids[0] == 7
    return list(ids[1:]), backend.backend.encode(text, add_special_tokens=False).ids, backend.longest


@pytest.mark.parametrize("kind", KINDS)
def test_windows_give_the_ids_of_the_whole_text(kind: str) -> None:
    texts_parted = 0
    for seed in range(6):
        text = hostile(seed)
        ids, whole, longest = joined(small_tokenizer(kind), text)
        assert ids == whole
        texts_parted += longest < len(text.encode())

    assert texts_parted >= 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["a", " ", "1", "=", "🎉", "ab", "e\u0301", "\n"])
def test_text_of_nothing_but_repetition_is_encoded_right(kind: str, text: str) -> None:
    # An odd length, so that each window begins at another place in what is repeated.
    ids, whole, _ = joined(small_tokenizer(kind), ("x" + text * 5001)[:5001])

    assert ids == whole


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_is_parted_at_every_window(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "OVERLAP", 768)
    text = "".join(random.Random(0).choices(LETTERS, k=10 * WINDOW))

    ids, whole, longest = joined(small_tokenizer(kind), text)

    assert ids == whole
    assert longest == WINDOW + 768


ACUTE, DOT_BELOW = "\u0301", "\u0323"  # marks of which normal forms put the second before the first


@pytest.mark.parametrize(
    "text",
    [
        # The first two windows overlap in bytes 896 to 1152. Marks that only one of the two sees change places there.
        "x" + 700 * ACUTE + DOT_BELOW + 1500 * "x",
        "x" + 437 * DOT_BELOW + 10 * ACUTE + 118 * DOT_BELOW + 1500 * "x",
        904 * "x" + 200 * ACUTE + 20 * DOT_BELOW + 1500 * "x",
    ],
    ids=["marks on both sides of the overlap", "marks before it", "marks behind it"],
)
@pytest.mark.parametrize("normaliser", [normalizers.NFC, normalizers.NFD])
def test_marks_that_change_places_keep_windows_together(
    text: str, normaliser: Callable[[], normalizers.Normalizer]
) -> None:
    """The middles of the two windows are equal: only what they have no sight of shows that they may not be parted."""
    tokenizer = small_tokenizer("llama2")
    tokenizer.backend_tokenizer.normalizer = normaliser()

    ids, whole, _ = joined(tokenizer, text)

    assert ids == whole


@pytest.mark.parametrize("kind", ["llama3", "gemma"])
def test_no_call_of_the_tokenizer_is_given_more_than_some_windows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call takes several hundred bytes a token, so this is the peak of memory, whatever the length of the texts."""
    backend, bytes_per_call = Counting(small_tokenizer(kind).backend_tokenizer), 2**14
    monkeypatch.setattr(long_texts, "OVERLAP", 768)
    monkeypatch.setattr(text_encoder, "BYTES_PER_CALL", bytes_per_call)
    monkeypatch.setattr(text_encoder, "Tokenizer", SimpleNamespace(from_str=lambda text: backend))
    long, short = ("".join(random.Random(0).choices(LETTERS, k=length)).encode() for length in (300_000, 3000))

    _, lengths = TextEncoder(small_tokenizer(kind)).encode([long, *[short] * 20])

    assert len(lengths) == 21
    assert sum(backend.bytes_of_calls) >= len(long) + 20 * len(short)
    assert max(backend.bytes_of_calls) <= bytes_per_call


def test_what_is_remembered_of_each_window_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As objects the tokens of an overlap would take more memory than the ids of a long text."""
    monkeypatch.setattr(long_texts, "WINDOW", 2**14)
    monkeypatch.setattr(long_texts, "OVERLAP", 2**12)
    windows = Windows(small_tokenizer("llama3").backend_tokenizer)
    text, ids = "".join(random.Random(0).choices(LETTERS, k=2**20)).encode(), array("i")
    tracemalloc.start()
    windows.encode(ids, text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # An id has 4 bytes; a quarter of the text lies in overlaps, of which half is remembered.
    assert peak <= 4 * 1.2 * len(ids) + 4 * len(text)


@pytest.mark.parametrize(
    ("pattern", "repeated"),
    [
        (LLAMA_3, [r"\p{L}", r"[^\s\p{L}\p{N}]", r"[\r\n]", r"\s", r"[\r\n]", r"\s", r"\s"]),
        (DEEPSEEK[0], []),
        (DEEPSEEK[1], ["[一-龥぀-ゟ゠-ヿ]"]),
        (r" ?[^(\s|[.,!?…。，、।۔،])]+", [r"[^(\s|[.,!?…。，、।۔،])]"]),
        (r"'(?i:[sdmt]|ll)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|\s++$", [r"\p{L}", r"\p{N}", r"\s"]),
        (r"a{2,}b{3}c{1,99}.*", ["a", "c", "."]),
    ],
)
def test_classes_that_a_pattern_repeats_are_found(pattern: str, repeated: list[str]) -> None:
    assert repeated_classes(pattern) == repeated


@pytest.mark.parametrize(
    "pattern", [r"(?<=a)b", r"(?<!a)b", r"\bword", r"^a", r"(a|b)+", r"(?:ab){3}", r"(a)\1", r"\Ga", r"(?x) a", r"[a"]
)
def test_pattern_that_may_look_elsewhere_is_not_understood(pattern: str) -> None:
    assert repeated_classes(pattern) is None


def test_greedy_class_that_ends_nowhere_keeps_windows_together() -> None:
    """A match up to the last semicolon: what is before a window's end depends on what comes after it."""
    tokenizer = small_tokenizer("llama3")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^#]*;|\p{L}+|\s+|[^\s\p{L}]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    text = "".join(random.Random(0).choices(LETTERS, k=5 * WINDOW)) + ";"

    ids, whole, longest = joined(tokenizer, text)

    assert ids == whole
    assert longest == len(text)


def test_tokenizer_of_unknown_parts_is_not_cut() -> None:
    def can_cut(**parts: object) -> bool:
        backend = small_tokenizer("llama3").backend_tokenizer
        for name, part in parts.items():
            setattr(backend, name, part)
        return Windows(backend).can_cut

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert can_cut()
    assert not can_cut(pre_tokenizer=pre_tokenizers.FixedLength(5))
    assert not can_cut(pre_tokenizer=pre_tokenizers.UnicodeScripts())
    assert not can_cut(pre_tokenizer=pre_tokenizers.Split(Regex(r"(?<=a)b"), "isolated"))
    assert not can_cut(pre_tokenizer=pre_tokenizers.Sequence([byte_level, byte_level]))
    assert not can_cut(normalizer=normalizers.Replace(Regex(r"\ba"), "b"))
