from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path

import pytest
from datasets import Dataset
from small_tokenizers import small_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mst_ds.data import IGNORE_INDEX, PackedDataset, batching, text_encoder, tokenise
from mst_ds.data.long_texts import Text
from mst_ds.data.text_encoder import TextEncoder

LOG = "a log of <eos> and <bos> in text<eos>"
UNIGRAM_OR_MERGES = ["llama3", "gemma", "llama2", "unigram", "wordpiece"]


def ids_of(tokenizer: PreTrainedTokenizerBase, *texts: str) -> list[list[int]]:
    return list(tokenise(Dataset.from_dict({"text": list(texts)}), tokenizer)["input_ids"])


@pytest.mark.parametrize("kind", ["llama3", "gemma", "unigram"])
@pytest.mark.parametrize(
    ("template", "prefix"), [("<bos> $A", ["<bos>"]), ("<bos> $A <eos>", ["<bos>"]), ("$A <eos>", []), (None, [])]
)
def test_document_begins_as_the_tokenizer_begins_a_text_and_ends_once(
    kind: str, template: str | None, prefix: list[str]
) -> None:
    tokenizer = small_tokenizer(kind, template)
    text = "def parse(self): return"

    (ids,) = ids_of(tokenizer, text)

    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [*tokenizer.convert_tokens_to_ids(prefix), *bare, tokenizer.eos_token_id]
    assert ids[:-1] == tokenizer(text)["input_ids"][: len(ids) - 1]


def test_prefix_is_found_where_the_tokenizer_adds_its_bos_by_a_setting(tmp_path: Path) -> None:
    small_tokenizer("llama3").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_bos_token = True

    (ids,) = ids_of(tokenizer, "def")

    assert ids == [*tokenizer("def")["input_ids"], tokenizer.eos_token_id]
    assert ids[0] == tokenizer.bos_token_id


def test_first_token_of_the_text_is_a_label_behind_a_bos() -> None:
    tokenizer = small_tokenizer("llama3", "<bos> $A")
    tokens = tokenise(Dataset.from_dict({"text": ["def parse", "return"]}), tokenizer)

    sample = PackedDataset(tokens, int(sum(map(len, tokens["input_ids"]))), 0)[0]

    not_labels = sample["input_ids"][sample["labels"] == IGNORE_INDEX]
    assert not_labels.tolist() == [tokenizer.bos_token_id] * 2


@pytest.mark.parametrize("kind", UNIGRAM_OR_MERGES)
def test_control_tokens_in_a_text_are_its_letters(kind: str) -> None:
    tokenizer = small_tokenizer(kind, "<bos> $A")

    (ids,) = ids_of(tokenizer, LOG)

    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    letters = "".join(tokenizer.convert_ids_to_tokens(ids[1:-1])).replace("<0x3C>", "<")
    assert letters.translate(str.maketrans("", "", "Ġ▁#")) == LOG.replace(" ", "")


@pytest.mark.parametrize("kind", UNIGRAM_OR_MERGES)
def test_text_has_the_ids_that_the_tokenizer_gives_it(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    text = "class A:\n\n  <think>x</think> héllo 你好 🎉 ab  ba\r\n"

    (ids,) = ids_of(tokenizer, text)

    assert ids[:-1] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<think>") in ids


def test_long_document_begins_and_ends_as_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small_tokenizer("llama3", "<bos> $A")
    (short,) = ids_of(tokenizer, "def parse(self): return")
    monkeypatch.setattr(text_encoder, "WINDOW", 1)

    (long,) = ids_of(tokenizer, "def parse(self): return")

    assert long == short


def test_so_many_documents_are_encoded_at_once_that_little_is_beside_the_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode, at_once = TextEncoder.encode, []

    def noted(encoder: TextEncoder, texts: Iterable[Text]) -> tuple[array[int], list[int]]:
        together = list(texts)
        at_once.append([len(text) for text in together])
        return encode(encoder, together)

    monkeypatch.setattr(TextEncoder, "encode", noted)
    monkeypatch.setattr(batching, "BYTES_AT_ONCE", 200)

    ids_of(small_tokenizer("llama3"), *["a" * 50] * 20, "b" * 1000, *["c"] * 20)

    assert sum(map(len, at_once)) == 41
    assert max(map(len, at_once)) == 4
    assert max(sum(lengths) - max(lengths) for lengths in at_once) <= 200


@pytest.mark.parametrize("kind", ["llama3", "gemma"])
def test_unknown_token_spelled_out_is_its_letters(kind: str) -> None:
    tokenizer = small_tokenizer(kind)

    (ids,) = ids_of(tokenizer, "an <unk>")

    assert tokenizer.unk_token_id not in ids
    assert "".join(tokenizer.convert_ids_to_tokens(ids)[-6:-1]).endswith("unk>")


def test_tokenizers_own_settings_are_left_as_they_are() -> None:
    tokenizer = small_tokenizer("unigram", "<bos> $A")
    before = tokenizer("a <eos>")["input_ids"]

    ids_of(tokenizer, LOG)

    assert tokenizer("a <eos>")["input_ids"] == before
    assert before[-1] == tokenizer.eos_token_id


def test_letter_that_pads_stays_a_letter() -> None:
    tokenizer = small_tokenizer("llama3")
    tokenizer.pad_token = "!"

    (ids,) = ids_of(tokenizer, "a!")

    assert ids == tokenizer.convert_tokens_to_ids(["a", "!", "<eos>"])


def test_saved_truncation_and_padding_are_not_applied() -> None:
    tokenizer = small_tokenizer("llama3")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=100)

    (ids,) = ids_of(tokenizer, "def parse(self): return")

    assert ids == [*small_tokenizer("llama3")("def parse(self): return")["input_ids"], tokenizer.eos_token_id]


def test_control_token_that_cannot_be_read_as_text_is_refused() -> None:
    backend = Tokenizer(models.BPE(vocab={"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4}, merges=[("<", "e"), ("<e", ">")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")

    with pytest.raises(ValueError, match=r"^a document of the dataset spells out '<e>', .*; allowed: .*\Z"):
        ids_of(tokenizer, "e<e>")


def test_tokenizer_with_parts_in_python_is_used_as_it_is() -> None:
    class Lower:
        def normalize(self, text: normalizers.NormalizedString) -> None:
            text.lowercase()

    tokenizer = small_tokenizer("llama3", "<bos> $A")
    tokenizer.backend_tokenizer.normalizer = normalizers.Normalizer.custom(Lower())
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    (ids,) = ids_of(tokenizer, "DEF <eos>")

    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert (tokens[0], tokens[-1]) == ("<bos>", "<eos>")
    # Which pieces they are is another each time: of pairs that are as frequent, training takes any.
    assert "".join(tokens[1:-1]) == "defĠ<eos>"
    assert "<eos>" not in tokens[1:-1]
