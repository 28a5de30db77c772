"""Tokenizers of the kinds that models have, trained here in a moment: their parts are those of the models named."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mst_ds.data import byte_tokenizer

SPECIAL = ["<unk>", "<bos>", "<eos>"]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_OSS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
)


def _text() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    yield from (root / "textwrap.py").read_text(encoding="utf-8").splitlines(keepends=True)
    yield from ("héllo wörld ñandú 你好，世界。 مرحبا بالعالم 안녕하세요 🎉👩‍👩‍👧 ﬁne\u00a0ﬂow 12345 67\r\n",) * 50
    yield from ("aaaaaaaa bbbb ABABAB        \n\n\n\t\tend", "==========", "abcabcabcabc") * 50


def _byte_level(splitter: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = splitter
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        _text(),
        trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False),
    )
    return backend


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _whole_texts(normalizer: normalizers.Normalizer, splitter: pre_tokenizers.PreTokenizer | None = None) -> Tokenizer:
    """Byte-pair encoding over whole texts, with bytes for what is unknown, as Llama 2 and Gemma."""
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    # Trained on words, so that pieces hold spaces only where they begin or are all spaces, and then used without them.
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(
        _text(),
        trainers.BpeTrainer(
            vocab_size=1000, limit_alphabet=90, special_tokens=[*SPECIAL, *pieces], show_progress=False
        ),
    )
    backend.normalizer = normalizer
    backend.pre_tokenizer = splitter
    return backend


def _unigram() -> Tokenizer:
    """As T5 and XLM-R."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(
        _text(),
        trainers.UnigramTrainer(vocab_size=600, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
    )
    return backend


def _wordpiece() -> Tokenizer:
    """As BERT."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(
        _text(), trainers.WordPieceTrainer(vocab_size=700, special_tokens=SPECIAL, show_progress=False)
    )
    return backend


_KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": lambda: byte_tokenizer().backend_tokenizer,
    "gpt2": lambda: _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": lambda: _byte_level(_split(LLAMA_3)),
    "qwen": lambda: _byte_level(_split(LLAMA_3.replace("{1,3}", "")), normalizers.NFC()),
    "gpt_oss": lambda: _byte_level(_split(GPT_OSS)),
    "deepseek": lambda: _byte_level(_split(*DEEPSEEK)),
    "llama2": lambda: _whole_texts(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
    "gemma": lambda: _whole_texts(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")),
    "mistral": lambda: _whole_texts(
        normalizers.Sequence([]), pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ),
    "unigram": _unigram,
    "wordpiece": _wordpiece,
}
KINDS = list(_KINDS)


@cache
def _json(kind: str) -> str:
    return _KINDS[kind]().to_str()


def small_tokenizer(kind: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """`template` is what surrounds a text: "<bos> $A", "<bos> $A <eos>" …"""
    if kind == "bytes":
        return byte_tokenizer()
    backend = Tokenizer.from_str(_json(kind))
    if template is not None:
        ids = [(token, backend.token_to_id(token)) for token in SPECIAL]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
    tokenizer.add_tokens(["<think>", AddedToken("\n\n", normalized=False), "ab  ba"])
    return tokenizer
