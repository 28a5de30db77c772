"""Chat templates that TRL ships for training, which mark answers: learned is what transformers takes the marks for.

Only these protect templates as people have them, whose marks stand inside of conditions and loops."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_tokenizers import chat_tokenizer

from mst_ds.data.chat_encoder import ChatEncoder
from mst_ds.rows.chats import Chat

trl = pytest.importorskip("trl", reason="TRL has no version for this Python")
TEMPLATES = sorted(Path(trl.__file__).with_name("chat_templates").glob("*_training.jinja"))
# They take lists of parts, of text or a picture, where others take a text.
OF_PICTURES = {"llava_next", "smolvlm", "idefics3"}
TEXTS = [path for path in TEMPLATES if path.stem.removesuffix("_training") not in OF_PICTURES]
CHATS = {
    "plain": ["Hi", "Hello!", "2 + 2?", "4"],
    "reasoning": ["Hi", "<think>\nA greeting.\n</think>\n\nHello!", "2 + 2?", "4"],
}


def test_trl_ships_them() -> None:
    assert len(TEXTS) >= 20


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_a_template_of_pictures_that_writes_nothing_of_a_text_is_refused(name: str) -> None:
    tokenizer = chat_tokenizer("qwen3")
    tokenizer.chat_template = (
        Path(trl.__file__).with_name("chat_templates").joinpath(f"{name}.jinja").read_text("utf-8")
    )
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    with pytest.raises(ValueError, match="does not write message 1 of row 1, as one does that takes lists of texts"):
        list(ChatEncoder(tokenizer, "assistant").encode([(Chat(messages, None), "row 1")]))


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_learned_is_what_the_template_marks(path: Path, chat: str) -> None:
    tokenizer = chat_tokenizer("qwen3")
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(CHATS[chat])
    ]
    expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ((ids, learned),) = ChatEncoder(tokenizer, "assistant").encode([(Chat(messages, None), "row 1")])
    assert ids.tolist() == expected["input_ids"]
    assert 0 < learned.sum() < len(learned)
    assert learned.astype(int).tolist() == expected["assistant_masks"]
