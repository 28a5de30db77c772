"""The kinds of rows, from files and from the hub, to ids and labels; and what is no row of a kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from chat_tokenizers import chat_tokenizer

from mst_ds.config import TrainConfig
from mst_ds.data import byte_tokenizer, load_documents, text_source, tokenise
from mst_ds.data.chat_encoder import ChatEncoder
from mst_ds.dataset_files import find_files

TOKENIZER = chat_tokenizer("llama3")
CHAT = [{"role": "user", "content": "Hi <|eot_id|>"}, {"role": "assistant", "content": "Yes, héllo."}]
SHARE_GPT = [{"from": "human", "value": "Hi <|eot_id|>"}, {"from": "gpt", "value": "Yes, héllo."}]
OTHER = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c", "extra": "x"}]


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(folder: Path, kind: str, *rows: dict[str, Any]) -> Path:
    if kind == "jsonl":
        return write_jsonl(folder / "a.jsonl", *rows)
    datasets.Dataset.from_list(list(rows)).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def tokens_of(path: Path | str, tokenizer: Any = TOKENIZER, **flags: Any) -> list[tuple[list[int], list[bool]]]:
    config = TrainConfig(dataset=str(path), **flags)
    tokens = tokenise(load_documents(config), tokenizer, config.loss_on)
    return list(zip(tokens["input_ids"], tokens["learned"], strict=True))


def refusal(path: Path | str, tokenizer: Any = TOKENIZER, **flags: Any) -> str:
    with pytest.raises(ValueError, match="allowed: ") as caught:
        tokens_of(path, tokenizer, **flags)
    message = str(caught.value)
    assert "\n" not in message
    return message


def expected(messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """By the template's one header and one end of turn."""
    ids: list[int] = [TOKENIZER.bos_token_id]
    learned = [False]
    for message in messages:
        header = TOKENIZER(
            f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", add_special_tokens=False
        ).input_ids
        content = TOKENIZER(message["content"], add_special_tokens=False, split_special_tokens=True).input_ids
        ids += [*header, *content, TOKENIZER.eos_token_id]
        learned += [False] * len(header) + [message["role"] == "assistant"] * (len(content) + 1)
    return ids, learned


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("row", "other"),
    [
        ({"messages": CHAT, "id": 3}, {"messages": OTHER}),
        ({"conversations": SHARE_GPT}, {"conversations": SHARE_GPT}),
        ({"conversations": CHAT}, {"conversations": OTHER}),
        ({"conversation": SHARE_GPT, "tools": "[]"}, {"conversation": SHARE_GPT}),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {"prompt": OTHER[:1], "completion": OTHER[1:]}),
        ({"text": "as rendered", "prompt": "half", "messages": CHAT}, {"messages": OTHER}),
    ],
)
def test_chats_are_found_by_their_columns_in_files_of_both_kinds(
    tmp_path: Path, kind: str, row: dict[str, Any], other: dict[str, Any]
) -> None:
    """The other row has a field that the first does not have: in a file of one form it is null there."""
    tokens = tokens_of(write(tmp_path, kind, row, other))

    assert tokens == [expected(CHAT), expected(CHAT if "from" in str(other) else OTHER)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tools_reach_the_template_as_a_list_and_as_json(tmp_path: Path, kind: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    call = [OTHER[0], {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}]
    calls = [{"messages": call, "tools": json.dumps(tools)}, {"messages": CHAT, "tools": None}]
    as_list = [{"messages": call, "tools": tools}, {"messages": CHAT}]
    found = [tokens_of(write(tmp_path, kind, *rows)) for rows in (calls, as_list)]

    assert found[0] == found[1]
    assert found[0][0][0] == TOKENIZER.apply_chat_template(call, tools, return_dict=False)
    assert found[0][1] == expected(CHAT)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_call_has_the_arguments_that_it_has_and_not_those_of_other_rows(tmp_path: Path, kind: str) -> None:
    """A file of parquet has all fields in every row, null where they were not."""
    calls = [
        [OTHER[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {name: 1}}}]}]
        for name in ("x", "y")
    ]
    ids = [each for each, _ in tokens_of(write(tmp_path, kind, *({"messages": call} for call in calls)))]
    assert ids == [TOKENIZER.apply_chat_template(call, return_dict=False) for call in calls]


def test_rows_of_the_hub_go_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"url": "x", "messages": CHAT}, {"url": "y", "messages": OTHER}])
    monkeypatch.setattr(text_source, "load_dataset", lambda *args, **kwargs: rows)

    assert tokens_of("owner/name") == [expected(CHAT), expected(OTHER)]
    bad = datasets.Dataset.from_list([{"messages": CHAT}, {"messages": [{"role": "judge", "content": "x"}]}])
    monkeypatch.setattr(text_source, "load_dataset", lambda *args, **kwargs: bad)
    assert refusal("owner/name").startswith("message 1 of row 2 of the dataset has the role 'judge'; allowed: system, ")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_of_a_prompt_the_completion_is_learned_and_eos(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": "Say <|eot_id|> a:", "completion": " b c"}, {"prompt": "", "completion": "d"}]
    path = write(tmp_path, kind, *rows)
    whole = [
        [TOKENIZER.bos_token_id, *TOKENIZER(text, add_special_tokens=False, split_special_tokens=True).input_ids]
        for text in ("Say <|eot_id|> a: b c", "d")
    ]
    ids = [[*each, TOKENIZER.eos_token_id] for each in whole]
    num_completion = len(TOKENIZER(" b c", add_special_tokens=False).input_ids) + 1
    learned = [[at >= len(ids[0]) - num_completion for at in range(len(ids[0]))], [False, True, True]]

    assert tokens_of(path) == list(zip(ids, learned, strict=True))
    assert tokens_of(path, loss_on="all") == [(each, [True] * len(each)) for each in ids]
    # A completion is the last thing that is said.
    assert tokens_of(path, loss_on="last_assistant") == tokens_of(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_ids_are_taken_as_they_are_and_labels_say_what_is_learned(tmp_path: Path, kind: str) -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, -100], "attention_mask": [1, 1, 1], "text": "not read"},
        {"input_ids": [8], "labels": [8], "attention_mask": [1], "text": "not read"},
    ]
    with_labels = tokens_of(write(tmp_path, kind, *rows))
    assert with_labels == [([5, 6, 7], [False, True, False]), ([8], [True])]
    assert tokens_of(write(tmp_path, kind, {"input_ids": [5, 6]})) == [([5, 6], [True, True])]


def test_the_users_own_column_of_text_wins(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": CHAT, "body": "x", "input_ids": [1]})
    config = TrainConfig(dataset=str(path), text_column="body")
    assert list(load_documents(config)["text"]) == ["x"]
    # The default counts as well where it is given.
    config = TrainConfig(dataset=str(write_jsonl(path, {"messages": CHAT, "text": "y"})))
    assert load_documents(config).column_names == ["json", "where"]
    config.given = frozenset({"text_column"})
    assert list(load_documents(config)["text"]) == ["y"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            "has preferences in 'chosen' and 'rejected', but objective is 'sft'",
        ),
        ([{"prompt": "a"}], "has 'prompt' but no 'completion'; allowed: a column of text, 'messages', "),
        ([{"completion": "a", "other": 1}], "has 'completion' but no 'prompt'"),
        ([{"texts": "x"}], "allowed: 'texts'; nearest: 'texts'"),
        ([{"text": "x"}, {"messages": CHAT}], "line 2 of '{}' has no 'text' but 'messages'; allowed: rows of one kind"),
        ([{"text": "x"}, {"input_ids": [1]}], "line 2 of '{}' has no 'text' but 'input_ids'"),
        ([{"input_ids": [1]}, {"text": "x"}], "line 2 of '{}' has no 'input_ids', only 'text'"),
        ([{"messages": [{"role": "user", "content": ["a", "b"]}]}], "has 2 part(s) as content; allowed: one text"),
        ([{"conversations": [{"from": "human"}]}], "has 'from' but no 'value'"),
        ([{"messages": CHAT, "tools": ["f"]}], "has 'tools' that are no list of objects"),
        ([{"prompt": "a", "completion": "b"}, {"completion": "a"}], "line 2 of '{}' has no 'prompt'"),
        ([{"prompt": CHAT, "completion": []}], "has no messages in 'completion'"),
        ([{"prompt": CHAT, "completion": CHAT[:1]}], "has no message of the assistant in its completion"),
        ([{"prompt": "abc", "completion": "abc"}], "line 1 of '{}' has a token across the border of its prompt"),
        ([{"input_ids": [1, -1]}], "line 1 of '{}' has the id -1"),
        ([{"input_ids": [True]}], "has 'input_ids' that are no list of whole numbers"),
        ([{"input_ids": None}, {"input_ids": [1]}], "line 1 of '{}' has no 'input_ids'; allowed: ids in every row"),
        (
            [{"input_ids": [1, 2], "completion_mask": [0, 1]}],
            "has 'completion_mask' beside 'input_ids', which is not read",
        ),
    ],
)
def test_bad_row_is_refused_in_one_line(tmp_path: Path, rows: list[Any], says: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *rows)

    assert says.replace("{}", str(path)) in refusal(path)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"messages": "User: hi"}], "row 1 of the dataset has a str in 'messages'"),
        ([{"messages": [*CHAT[:1], {"role": "assistant"}]}], "message 2 of row 1 of the dataset has no content"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}],
            "row 2 of the dataset has no 'completion'",
        ),
        ([{"prompt": "a", "rejected": "b"}], "has preferences in 'rejected'"),
        ([{"input_ids": [1]}, {"input_ids": None}], "row 2 of the dataset has no 'input_ids'"),
        ([{"input_ids": [1.5]}], "row 1 of the dataset has double in 'input_ids'; allowed: a list of whole numbers"),
        ([{"input_ids": "1 2"}], "row 1 of the dataset has string as 'input_ids'; allowed: a list of whole numbers"),
        ([{"input_ids": [1, 2], "labels": [2, -100]}], "row 1 of the dataset has the label 2 at the id 1, token 1"),
    ],
)
def test_bad_row_of_parquet_is_refused_by_its_number(tmp_path: Path, rows: list[Any], says: str) -> None:
    assert says in refusal(write(tmp_path, "parquet", *rows))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "x"}, "loss_on is 'all', but dataset"),
        ({"input_ids": [1]}, "has rows of 'input_ids', without turns to choose from; allowed: no --loss_on"),
    ],
)
def test_loss_on_for_rows_without_turns_is_refused(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    config = TrainConfig(dataset=str(write_jsonl(tmp_path / "a.jsonl", row)), loss_on="all")
    config.given = frozenset({"loss_on"})
    with pytest.raises(ValueError, match="allowed: no --loss_on") as caught:
        find_files(config)
    assert says in str(caught.value)


def test_ids_are_cached_by_the_template_and_by_what_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    encode = ChatEncoder.encode
    monkeypatch.setattr(ChatEncoder, "encode", lambda *args: calls.append(args) or encode(*args))
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": CHAT})

    def run(**flags: Any) -> tuple[int, int]:
        tokenizer = chat_tokenizer("llama3")
        tokenizer.chat_template = flags.pop("template", tokenizer.chat_template)
        ((ids, learned),) = tokens_of(path, tokenizer, **flags)
        return len(ids), sum(learned)

    first = run()
    assert run() == first
    assert len(calls) == 1
    assert run(loss_on="all") == (first[0], first[0])
    longer = chat_tokenizer("llama3").chat_template + "{{- '.' -}}"
    assert run(loss_on="all", template=longer) == (first[0] + 1, first[0] + 1)
    assert len(calls) == 3


def test_prompts_and_completions_of_text_need_no_chat_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "ab", "completion": "c"})
    tokenizer = byte_tokenizer()
    expected = ([*b"abc", tokenizer.eos_token_id], [False, False, True, True])
    assert tokens_of(path, tokenizer) == [expected]


def test_text_has_no_second_column(tmp_path: Path) -> None:
    """All of it is learned, and its file of ids is as it was."""
    documents = load_documents(TrainConfig(dataset=str(write_jsonl(tmp_path / "a.jsonl", {"text": "x"}))))
    assert tokenise(documents, TOKENIZER).column_names == ["input_ids"]
