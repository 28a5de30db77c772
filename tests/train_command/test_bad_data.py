"""What is wrong in a dataset is one line that names the file, and the row where one is to blame, and nothing is left of
the run: no folder, and no process that met another."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import TINY, write

from mst_ds.data import byte_tokenizer

# It takes no system prompt, and ends an answer in another way where it is the last.
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}{{ '.' if loop.last and message.role == 'assistant' else ';' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
CHAT = {"messages": [ASK, ANSWER]}
IDS = {"input_ids": [1, 2], "labels": [-100, 2]}
COMPLETED = {"prompt": "a", "completion": "b"}


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(*messages: Any, **more: Any) -> bytes:
    """A good chat, and then this one."""
    return lines(CHAT, {"messages": messages, **more})


def table(**columns: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


# By kind: the file's name, what it holds, what is said with FILE for its path, and flags behind it.
BAD: dict[str, tuple[Any, ...]] = {
    "no messages": ("a.jsonl", chat(), "line 2 of 'FILE' has no messages in 'messages'"),
    "messages that are a text": (
        "a.jsonl",
        lines({"messages": "User: hi"}),
        "line 1 of 'FILE' has a str in 'messages'",
    ),
    "a message that is a text": ("a.jsonl", chat("hi"), "message 1 of line 2 of 'FILE' is a str"),
    "another kind of row": ("a.jsonl", lines(CHAT, {"text": "x"}), "line 2 of 'FILE' has no 'messages', only 'text'"),
    "an unknown role": ("a.jsonl", chat(ASK | {"role": "judge"}), "message 1 of line 2 of 'FILE' has the role 'judge'"),
    "no role": ("a.jsonl", chat({"content": "x"}), "message 1 of line 2 of 'FILE' has no role, only 'content'"),
    "no content": ("a.jsonl", chat(ASK, {"role": "assistant"}), "message 2 of line 2 of 'FILE' has no content"),
    "a content of no text": (
        "a.jsonl",
        chat(ASK | {"content": 7}),
        "message 1 of line 2 of 'FILE' has a int as content",
    ),
    "an unknown speaker": ("a.jsonl", chat({"from": "I", "value": "x"}), "message 1 of line 2 of 'FILE' is from 'I'"),
    "tools that are no JSON": ("a.jsonl", chat(ASK, tools="{"), "line 2 of 'FILE' has 'tools' that are not JSON"),
    "half a character": ("a.jsonl", chat(ASK | {"content": "\ud800"}), "line 2 of 'FILE' has half a surrogate pair"),
    "a template that fails": (
        "a.jsonl",
        chat(ASK | {"role": "system"}, ASK, ANSWER),
        "does not take line 2 of 'FILE', up to message 3 (no system prompt)",
    ),
    "answers that are not told": ("a.jsonl", chat(ASK, ANSWER, ASK, ANSWER), "writes message 2 of line 2 of 'FILE' in"),
    "no last answer": (
        "a.jsonl",
        chat(ASK, ANSWER, ASK),
        "line 2 of 'FILE' ends with a message of the user",
        "--loss_on",
        "last_assistant",
    ),
    "an empty completion": (
        "a.jsonl",
        lines(COMPLETED, COMPLETED | {"completion": ""}),
        "line 2 of 'FILE' has an empty completion",
    ),
    "no completion": ("a.jsonl", lines(COMPLETED, {"prompt": "a"}), "line 2 of 'FILE' has no 'completion'"),
    "a text and messages": (
        "a.jsonl",
        lines(COMPLETED, {"prompt": "a", "completion": [ANSWER]}),
        "line 2 of 'FILE' has a str as prompt and a list as completion",
    ),
    "labels longer than ids": (
        "a.jsonl",
        lines(IDS, IDS | {"labels": [1, 2, 2]}),
        "line 2 of 'FILE' has 3 labels for 2 ids",
    ),
    "labels of other ids": (
        "a.jsonl",
        lines(IDS, IDS | {"labels": [2, 2]}),
        "line 2 of 'FILE' has the label 2 at the id 1, token 1",
    ),
    "ids beyond the vocabulary": ("a.jsonl", lines(IDS, {"input_ids": [257]}), "line 2 of 'FILE' has the id 257"),
    "ids that are no numbers": (
        "a.jsonl",
        lines(IDS, {"input_ids": [0.5]}),
        "line 2 of 'FILE' has 'input_ids' that are",
    ),
    "padding": ("a.jsonl", lines(IDS, IDS | {"attention_mask": [1, 0]}), "line 2 of 'FILE' has padding"),
    "no JSON": ("a.jsonl", lines({"text": "x"}) + b'{"text": "y}\n', "line 2 of 'FILE' is not JSON in UTF-8"),
    "no object": ("a.jsonl", lines({"text": "x"}, 7), "line 2 of 'FILE' is not an object"),
    "a number as text": ("a.jsonl", lines({"text": "x"}, {"text": 7}), "line 2 of 'FILE' has a int in 'text', 7"),
    "a list that is cut": ("a.json", b'[{"text": "x"}, {"text": "y"', "row 2 of 'FILE' is not JSON"),
    "cells that are missing": ("a.csv", b"id,text\n1,x\n2\n", "row 2 of 'FILE' has not the 2 cells of the first row"),
    "a gz that is cut": ("a.jsonl.gz", gzip.compress(lines({"text": "x" * 99}))[:-9], "'FILE' cannot be read ("),
    "a text of another encoding": ("a.txt", b"a\xffb", "'FILE' is not text in UTF-8 ("),
    "a parquet that is cut": ("a.parquet", table(text=["x"])[:-9], "'FILE' cannot be read ("),
    "a parquet of numbers": (
        "a.parquet",
        table(text=[7]),
        "text_column is 'text', but in dataset 'FILE' it holds Value(",
    ),
    "a parquet of other ids": ("a.parquet", table(input_ids=[[1], [257]]), "row 2 of 'FILE' has the id 257"),
    "a parquet without a chat": (
        "a.parquet",
        table(messages=[[ASK, ANSWER], None]),
        "row 2 of 'FILE' has no messages in 'messages'",
    ),
    "an empty file": ("a.jsonl", b"\n", "dataset 'FILE' is empty"),
    "no such column": ("a.jsonl", lines({"txt": "x"}), "but dataset 'FILE' has no such column; allowed: 'txt'"),
    "nothing learned": (
        "a.jsonl",
        lines({"messages": [ASK]}),
        "nothing is learned of the 1 document of the dataset",
    ),
    "a weight alone": ("a.jsonl", lines({"text": "x"}), "dataset 'FILE' has no weight, but another has", "FILE:0.5"),
    "weights that do not add up": ("a.jsonl", lines({"text": "x"}), "make 1.2;", "FILE:0.6", "FILE:0.6"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    write(folder / "config.json", {"model_type": "llama", **TINY})
    return str(folder)


def test_there_are_twenty_kinds() -> None:
    assert len(BAD) >= 20


@pytest.mark.parametrize("kind", BAD)
def test_bad_data_is_one_line_and_leaves_nothing(
    kind: str, model: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    name, content, says, *flags = BAD[kind]
    file = tmp_path / "data" / name
    file.parent.mkdir()
    file.write_bytes(content)
    datasets = [] if kind == "weights that do not add up" else [str(file)]
    more: Sequence[str] = [flag.replace("FILE", str(file)) for flag in flags]

    line = refused(
        *("--model", model, "--seq_len", "64", "--preflight", "false", "--output_dir", str(tmp_path / "run")),
        *("--dataset", *datasets, *more),
    )

    assert says.replace("FILE", str(file)) in line
    assert "; allowed: " in line
    assert not (tmp_path / "run").exists()
