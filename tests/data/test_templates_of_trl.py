"""Chat templates that TRL ships for training, which mark answers: learned is what transformers takes the marks for.

Only these protect templates as people have them, whose marks stand inside of conditions and loops. And where they are
taken in place of the tokenizer's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from chat_tokenizers import chat_tokenizer
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from mst_ds.data import training_template
from mst_ds.data.chat_encoder import ChatEncoder
from mst_ds.data.tokenising import tokenise, tokenise_all
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


OWN = {path.stem.removesuffix("_training"): path for path in TEMPLATES}


def written_by(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose own template is one that TRL knows."""
    tokenizer = chat_tokenizer("phi4" if name == "gptoss" else "qwen3")
    tokenizer.chat_template = OWN[name].with_name(f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


def rows(*contents: str) -> Dataset:
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(contents)]
    return Dataset.from_dict({"json": [json.dumps({"messages": messages})]})


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "phi3"])
def test_answers_that_the_own_template_does_not_tell_are_told_by_that_of_trl(name: str) -> None:
    tokenizer = written_by(name)
    own = tokenizer.chat_template
    marking = chat_tokenizer("phi4" if name == "gptoss" else "qwen3")
    marking.chat_template = OWN[name].read_text(encoding="utf-8")

    several, alone = rows(*CHATS["reasoning"]), rows(*CHATS["plain"][:2])
    tokens, note = tokenise_all([several, alone], ["x", "y"], tokenizer, "assistant")
    expected = [tokenise(each, marking)[:] for each in (several, alone)]

    assert [each[:] for each in tokens] == expected
    assert note is not None
    assert note.startswith(f"chat template: TRL's training template of {name}, because the tokenizer's own writes ")
    assert "writes message 2 of row 1 of x in another way when more messages follow" in note
    assert tokenizer.chat_template == own
    # One answer is told by the tokenizer's own, which then writes all.
    assert tokenise_all([alone], ["x"], tokenizer, "assistant")[1] is None


def test_without_trl_and_of_a_template_that_it_does_not_know_the_refusal_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = written_by("qwen3")
    tokenizer.chat_template += " "
    with pytest.raises(ValueError, match="allowed: --chat_template_path with a template that marks answers") as known:
        tokenise_all([rows(*CHATS["plain"])], "x", tokenizer, "assistant")
    assert "pip install trl" not in str(known.value)

    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(training_template, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"or pip install trl .*nearest: .* --loss_on last_assistant"):
        tokenise_all([rows(*CHATS["plain"])], "x", written_by("qwen3"), "assistant")
