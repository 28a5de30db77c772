from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

from mst_ds.config import TrainConfig
from mst_ds.data import byte_tokenizer, load_tokenizer

TEXTS = [
    "",
    " two  spaces\tand\n\n\r\nlines ",
    "héllo wörld 🎉 مرحبا 你好 \u200d",
    "".join(map(chr, range(0x300))),
    "it 's n't . , <|endoftext|> <s> [PAD]",
]
MODEL = LlamaConfig(vocab_size=264)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_the_ids_and_come_back_as_the_same_text(text: str) -> None:
    tokenizer = byte_tokenizer()

    ids = tokenizer(text)["input_ids"]

    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_byte_tokenizer_has_one_special_token_after_the_bytes() -> None:
    tokenizer = byte_tokenizer()

    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 256
    assert len(tokenizer) == 257


def test_saved_byte_tokenizer_is_read_by_auto_tokenizer(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)

    for text in TEXTS:
        assert reloaded(text)["input_ids"] == list(text.encode())
        assert reloaded.decode(list(text.encode())) == text
    assert reloaded.eos_token_id == 256


def test_shipped_model_reads_bytes() -> None:
    assert load_tokenizer(TrainConfig(), MODEL)("é")["input_ids"] == [0xC3, 0xA9]


def test_the_flag_goes_before_the_model(tmp_path: Path) -> None:
    own, other = byte_tokenizer(), byte_tokenizer()
    other.add_tokens(["word"])
    own.save_pretrained(tmp_path / "model")
    other.save_pretrained(tmp_path / "other")

    model = str(tmp_path / "model")

    assert len(load_tokenizer(TrainConfig(model=model), MODEL)) == 257
    assert len(load_tokenizer(TrainConfig(model=model, tokenizer=str(tmp_path / "other")), MODEL)) == 258
    assert len(load_tokenizer(TrainConfig(tokenizer=str(tmp_path / "other")), MODEL)) == 258


def test_more_ids_than_the_model_has_is_refused() -> None:
    load_tokenizer(TrainConfig(), LlamaConfig(vocab_size=257))
    with pytest.raises(ValueError, match=r"^tokenizer 'byte level' has 257 ids, .* vocab_size of 256; .*\Z"):
        load_tokenizer(TrainConfig(), LlamaConfig(vocab_size=256))


def test_tokens_beyond_the_model_are_refused_unless_they_are_added(tmp_path: Path) -> None:
    more = byte_tokenizer()
    more.add_tokens(["<|user|>", "<|bot|>"], special_tokens=True)
    more.save_pretrained(tmp_path)
    own, config = LlamaConfig(vocab_size=257), TrainConfig(tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match=r"259 ids, .* --add_special_tokens '<\|user\|>' '<\|bot\|>', which adds rows"):
        load_tokenizer(config, own)
    with pytest.raises(ValueError, match="259 ids"):
        load_tokenizer(config.changed(add_special_tokens=["<|bot|>"]), own)
    found = load_tokenizer(config.changed(add_special_tokens=["<|bot|>", "<|user|>"]), own)
    assert found.convert_tokens_to_ids("<|bot|>") == 258


@pytest.mark.parametrize("model_config", [LlamaConfig(), Qwen2Config()], ids=["llama", "qwen2"])
def test_folder_without_tokenizer_is_refused(tmp_path: Path, model_config: LlamaConfig | Qwen2Config) -> None:
    model_config.save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"^no tokenizer found at .*; allowed: --tokenizer .*\Z"):
        load_tokenizer(TrainConfig(model=str(tmp_path)), model_config)


def test_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"^tokenizer .* has no EOS token .*\Z"):
        load_tokenizer(TrainConfig(tokenizer=str(tmp_path)), MODEL)


def test_a_chat_template_of_a_file_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}é\n{% endfor %}"
    (tmp_path / "mine.jinja").write_text(template, encoding="utf-8")
    tokenizer = load_tokenizer(TrainConfig(chat_template_path=str(tmp_path / "mine.jinja")), MODEL)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == template


def test_no_file_of_a_chat_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"chat_template_path is .*; allowed: the file of a chat template"):
        load_tokenizer(TrainConfig(chat_template_path=str(tmp_path)), MODEL)
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text: byte 0"):
        load_tokenizer(TrainConfig(chat_template_path=str(tmp_path / "bytes")), MODEL)
