"""Chats to ids and labels, against what each template is known to write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from chat_tokenizers import CONTROL, chat_tokenizer
from small_tokenizers import small_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from mst_ds.config import LossOn
from mst_ds.data.chat_encoder import ChatEncoder
from mst_ds.data.chat_template import ChatTemplate
from mst_ds.rows.chats import Chat

# What stands before all turns, and what before and behind the content of each; what stands behind an answer is its own.
_IM = {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("system", "user", "assistant")}
_HEADER = {
    role: (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>") for role in ("system", "user", "assistant")
}
_ROLE = {
    role: (f"<|start_of_role|>{role}<|end_of_role|>", "<|end_of_text|>\n") for role in ("system", "user", "assistant")
}
WRITTEN: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "chatml": ("", _IM),
    "llama3": ("<bos>", _HEADER),
    "gemma3": (
        "<bos>",
        {
            "user": ("<start_of_turn>user\n", "<end_of_turn>\n"),
            "assistant": ("<start_of_turn>model\n", "<end_of_turn>\n"),
        },
    ),
    "mistral": ("<bos>", {"user": ("[INST]", "[/INST]"), "assistant": ("", "</s>")}),
    "phi4": (
        "",
        {role: (f"<|im_start|>{role}<|im_sep|>", "<|im_end|>") for role in ("system", "user", "assistant")},
    ),
    "deepseek": (
        "<bos>",
        {
            "system": ("", ""),
            "user": ("<｜User｜>", ""),
            "assistant": ("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        },
    ),
    "granite": ("", _ROLE),
    # Those that write the last answer otherwise than one before.
    "qwen3": ("", {**_IM, "assistant": ("<|im_start|>assistant\n", "<|im_end|>\n")}),
    "channels": (
        "",
        {"user": ("<|start|>user<|message|>", "<|end|>"), "assistant": ("<|start|>assistant", "<|return|>")},
    ),
    "smollm3": ("", {**_IM, "assistant": ("<|im_start|>assistant\n", "<|im_end|>")}),
}
_BEFORE_A_LAST_ANSWER = {"qwen3": "<think>\n\n</think>\n\n", "channels": "<|channel|>final<|message|>"}
_BY_PREFIXES = ["chatml", "llama3", "gemma3", "mistral", "phi4", "deepseek", "granite"]
# A tokenizer of another kind must not matter to what is learned.
_KINDS = [(name, None) for name in [*_BY_PREFIXES, "smollm3"]] + [
    ("chatml", "llama2"),
    ("granite", "unigram"),
    ("phi4", "gpt2"),
    ("llama3", "mistral"),
]


def turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Of user and assistant, by turns."""
    roles = ("user", "assistant")
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def encode(
    tokenizer: Any, messages: list[dict[str, Any]], loss_on: LossOn = "assistant", **of_chat: Any
) -> tuple[list[int], list[bool]]:
    chat = Chat(messages, of_chat.pop("tools", None), **of_chat)
    ((ids, learned),) = ChatEncoder(tokenizer, loss_on).encode([(chat, "line 7 of 'a.jsonl'")])
    return ids.tolist(), learned.tolist()


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ValueError, match=r"line 7 of 'a\.jsonl'.*; allowed: ") as caught:
        encode(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(name: str, messages: list[dict[str, Any]], only_last: bool) -> Iterator[tuple[str, bool]]:
    """The parts of a chat, and whether each is learned, put together by hand."""
    begin, of_roles = WRITTEN[name]
    yield begin, False
    for number, message in enumerate(messages):
        before, behind = of_roles[message["role"]]
        is_last = number + 1 == len(messages)
        yield before, False
        is_answer = message["role"] == "assistant" and (is_last or not only_last)
        if is_answer and is_last:
            yield _BEFORE_A_LAST_ANSWER.get(name, ""), True
        yield message["content"] + behind, is_answer
        # {% generation %} ends before the line feed.
        yield "\n" if name == "smollm3" and message["role"] == "assistant" else "", False


def by_hand(tokenizer: Any, parts: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """The ids of the whole as the tokenizer gives them, each learned where its first character is."""
    encoded = tokenizer("".join(part for part, _ in parts), add_special_tokens=False, return_offsets_mapping=True)
    is_learned = [learned for part, learned in parts for _ in part]
    return encoded["input_ids"], [is_learned[start] for start, _ in encoded["offset_mapping"]]


@pytest.mark.parametrize(("name", "kind"), _KINDS)
@pytest.mark.parametrize("loss_on", ["assistant", "last_assistant"])
def test_learned_are_the_answers_with_what_ends_them(name: str, kind: str | None, loss_on: LossOn) -> None:
    tokenizer = chat_tokenizer(name, kind=kind)
    system = "Be brief." if "system" in WRITTEN[name][1] else None
    messages = turns("Hi  there, 12 héllo 🎉", "Yes.\n\n Indeed", "And </think> now?", "No <tool_call>.", system=system)

    ids, learned = encode(tokenizer, messages, loss_on)

    assert (ids, learned) == by_hand(tokenizer, list(written(name, messages, loss_on == "last_assistant")))
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert sum(learned) > 3


@pytest.mark.parametrize("name", ["qwen3", "channels"])
def test_an_answer_that_is_written_otherwise_when_it_is_not_the_last_is_refused(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    messages = turns("Hi", "Yes.", "And?", "No.")

    message = refusal(tokenizer, messages)
    assert "message 2 of line 7 of 'a.jsonl' in another way when more messages follow" in message
    assert message.endswith("nearest: a row for each answer, with --loss_on last_assistant")
    # One answer is the last; and of several the last alone is exact.
    assert encode(tokenizer, messages[:2]) == by_hand(tokenizer, list(written(name, messages[:2], True)))
    _, learned = encode(tokenizer, messages, "last_assistant")
    expected = _BEFORE_A_LAST_ANSWER[name] + "No." + WRITTEN[name][1]["assistant"][1]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.endswith(expected)
    assert sum(learned) == len(tokenizer(expected, add_special_tokens=False)["input_ids"])
    assert learned == sorted(learned)


def test_a_system_prompt_that_moves_to_the_last_turn_is_refused() -> None:
    messages = turns("Hi", "Yes.", "And?", "No.", system="Be brief.")

    assert "in another way when more messages follow" in refusal(chat_tokenizer("mistral"), messages)
    _, learned = encode(chat_tokenizer("mistral"), messages, "last_assistant")
    assert 0 < sum(learned) < 6


def test_a_prompt_that_begins_reasoning_which_the_chat_does_not_have_is_refused() -> None:
    tokenizer = chat_tokenizer("deepseek")
    prompt = '"<｜Assistant｜>" -}}\n{%- endif'
    assert prompt in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(prompt, prompt.replace('｜>"', '｜><think>\\n"'))

    message = refusal(tokenizer, turns("Hi", "Yes."))
    assert "writes message 2 of line 7 of 'a.jsonl' otherwise than as an answer to the messages before it" in message
    assert "which end with '<｜User｜>Hi<｜Assistant｜><think>\\n' there" in message.replace("<bos>", "")


def test_reasoning_and_calls_of_tools_are_the_assistants_words() -> None:
    reasoned = [*turns("Hi"), {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm"}]
    called = [*turns("Hi"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}]
    qwen3, llama3 = chat_tokenizer("qwen3"), chat_tokenizer("llama3")
    begin = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    parts = [(begin, False), ("<think>\nHm\n</think>\n\nYes.<|im_end|>\n", True)]
    assert encode(qwen3, reasoned) == by_hand(qwen3, parts)

    tools = [{"type": "function", "function": {"name": "f", "parameters": {"<|eot_id|>": "<|eot_id|>"}}}]
    ids, learned = encode(llama3, called, tools=tools)
    answer = '{"name": "f", "arguments": {"x": 1}}<|eot_id|>'
    assert learned[-20:] == by_hand(llama3, [("<|end_header_id|>\n\n", False), (answer, True)])[1][-20:]
    # Those of the parameters, the name of a field among them, are letters.
    assert ids.count(llama3.convert_tokens_to_ids("<|eot_id|>")) == 3


def test_of_a_completion_of_messages_earlier_answers_are_given() -> None:
    for name in ("chatml", "smollm3"):
        tokenizer = chat_tokenizer(name)
        messages = turns("Hi", "Yes.", "And?", "No.", system="x")
        assert encode(tokenizer, messages, num_given=4) == encode(tokenizer, messages, "last_assistant")
        assert all(encode(tokenizer, messages, "all", num_given=4)[1])


@pytest.mark.parametrize("name", CONTROL)
def test_control_tokens_that_a_message_spells_out_are_letters(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    control = {id for id in tokenizer.all_special_ids if id != tokenizer.unk_token_id}
    # A channel in an answer is refused by its template.
    letters = " ".join(token for token in CONTROL[name] if token != "<|channel|>")

    ids, learned = encode(tokenizer, turns(f"a {letters} b", f"c {letters} d"))
    plain, _ = encode(tokenizer, turns("a b", "c d"))

    assert [id for id in ids if id in control] == [id for id in plain if id in control]
    assert len(ids) > len(plain)
    # The answer is learned with its letters: only they make it longer.
    assert sum(learned) - sum(encode(tokenizer, turns(f"a {letters} b", "c d"))[1]) == (len(ids) - len(plain)) // 2
    if name == "phi4":  # bytes, so that its text comes back
        text = "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", " ")
        assert text == tokenizer.apply_chat_template(turns(f"a {letters} b", f"c {letters} d"), tokenize=False)


def test_a_control_token_by_which_the_template_decides_is_refused() -> None:
    tokenizer = chat_tokenizer("qwen3")
    content = "<think>\nHm\n</think>\n\nYes."
    encode(tokenizer, turns("Hi", content))  # an added token that is not special is what it is in any text
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]}, replace_extra_special_tokens=False)

    message = refusal(tokenizer, turns("Hi", content))
    assert "spells out '</think>', a control token by which the chat template decides" in message
    assert "reasoning in 'reasoning_content'" in message
    # Where the template only hands it on it is letters.
    _, learned = encode(tokenizer, turns("Why </think>?", "Yes."))
    assert sum(learned) > 3


def test_what_cannot_stay_text_is_refused() -> None:
    tokenizer = chat_tokenizer("chatml")
    assert "has U+FDD0" in refusal(tokenizer, turns("a\ufdd0b", "c"))
    # "in" is what merging letters gives.
    tokenizer.add_special_tokens({"additional_special_tokens": ["in"]}, replace_extra_special_tokens=False)
    assert "spells out 'in', which the tokenizer takes for its control token" in refusal(tokenizer, turns("in", "c"))


def test_tokens_across_the_border_of_an_answer_are_refused() -> None:
    """The prompt ends with a line feed: one that the answer begins with would be one token with it."""
    tokenizer = chat_tokenizer("chatml")

    message = refusal(tokenizer, turns("Hi", "\nYes"))
    assert "no border between tokens where what is learned begins or ends, after " in message
    assert "and before '\\nYes" in message
    # Where the template marks answers, too.
    assert "and before '\\nYes" in refusal(chat_tokenizer("smollm3"), turns("Hi", "\nYes"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert "after 'abc' and before 'abc'" in refusal(tokenizer, turns("abc", "abc"))


def test_prompt_whose_ids_alone_are_others_is_refused() -> None:
    """Two spaces are one token where nothing follows them, and two before a sign: the border is there all the same."""
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokens = [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).tokens for text in ("a  ", "a  ;")]
    assert tokens == [["a", "ĠĠ"], ["a", "Ġ", "Ġ", ";"]]

    assert "after 'a  ' and before ';'" in refusal(tokenizer, turns("a  ", ";"))


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("gemma3", [*turns("a", "b"), *turns("c", "d")][1:], "turns of user and assistant must alternate"),
        ("channels", turns("a", "<|channel|>final"), "(a channel belongs into a field of its own)"),
        ("chatml", [{"role": "user"}, {"role": "assistant", "content": "a"}], "has no attribute 'content'"),
    ],
)
def test_template_that_does_not_take_a_chat_says_why(name: str, messages: Any, reason: str) -> None:
    assert reason in refusal(chat_tokenizer(name), messages)


def test_last_assistant_needs_an_answer_at_the_end() -> None:
    message = refusal(chat_tokenizer("chatml"), turns("a", "b", "c"), "last_assistant")
    assert "ends with a message of the user; allowed: of the assistant" in message
    assert not encode(chat_tokenizer("chatml"), turns("a", "b", "c"))[1][-1]


def test_marks_that_are_not_one_an_answer_are_refused_where_some_are_learned() -> None:
    tokenizer = chat_tokenizer("smollm3")
    tokenizer.chat_template += "{% generation %}.{% endgeneration %}"

    assert sum(encode(tokenizer, turns("a", "b", "c", "d"))[1]) == 5
    message = refusal(tokenizer, turns("a", "b", "c", "d"), "last_assistant")
    assert "marks 3 part(s) of line 7 of 'a.jsonl' as generated, which has 2 message(s)" in message


def test_marks_need_no_prompt_of_the_same_ids() -> None:
    """The mark says where an answer begins, so a template need not know add_generation_prompt."""
    tokenizer = chat_tokenizer("smollm3")
    tokenizer.chat_template = tokenizer.chat_template.replace("add_generation_prompt", "false")
    messages = turns("a", "b", "c", "d")
    assert encode(tokenizer, messages) == by_hand(tokenizer, list(written("smollm3", messages, False)))


def test_an_answer_that_begins_a_chat_has_an_empty_prompt() -> None:
    ids, learned = encode(chat_tokenizer("phi4"), turns("a", "b")[1:])
    assert learned == [False] * (len(ids) - 2) + [True] * 2


def test_eos_that_is_no_special_token_is_refused() -> None:
    """It would be found in messages as well, and what the template writes could not be told from it."""
    backend = small_tokenizer("qwen").backend_tokenizer
    backend.add_tokens([AddedToken("<|im_end|>", special=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = chat_tokenizer("chatml").chat_template

    with pytest.raises(ValueError, match=r"has '<\|im_end\|>' not as a special token of its own; allowed: "):
        ChatEncoder(tokenizer, "all")


def test_no_chat_template_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="has no chat template; allowed: --chat_template_path with a file of one"):
        ChatTemplate(chat_tokenizer("chatml", has_template=False))


def test_many_chats_are_encoded_in_groups_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chat_tokenizer("llama3")
    chats = [(Chat(turns(f"q{number}" * number, "a" * number), None), f"row {number}") for number in range(1, 9)]
    one_by_one = [tuple(map(list, next(ChatEncoder(tokenizer, "assistant").encode([chat])))) for chat in chats]
    monkeypatch.setattr("mst_ds.data.chat_encoder.BYTES_PER_CALL", 150)
    groups = list(ChatEncoder(tokenizer, "assistant").encode(chats))
    assert [tuple(map(list, each)) for each in groups] == one_by_one
