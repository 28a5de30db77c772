"""A row with a chat, or with a prompt and its completion: what it must hold, and the one form that it is brought to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from mst_ds.config import nearest
from mst_ds.rows.kinds import COMPLETION, PROMPT, TOOLS, chat_column

Message: TypeAlias = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = "assistant"
# ShareGPT's names of who speaks.
_FROM = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    ASSISTANT: ASSISTANT,
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Chat:
    """messages: as a chat template takes them, of which the first `num_given` are not learned; tools: JSON schemas."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    num_given: int = 0


@dataclass(frozen=True)
class PromptCompletion:
    """Two texts, of which the second goes on where the first ends."""

    prompt: str
    completion: str


def read_row(row: Mapping[str, Any], where: str) -> Chat | PromptCompletion:
    """The chat of a row with a column of chats, else its prompt and completion: a chat too, if they are messages.

    Args:
        where: names the row, for a message: "line 3 of 'chats.jsonl'".

    Raises:
        ValueError: the row lacks a part, or a part is not of its form.
    """
    column = chat_column(row)
    tools = tools_of(row.get(TOOLS), where)
    if column is not None:
        return Chat(messages_of(row[column], column, where), tools)
    prompt, completion = row.get(PROMPT), row.get(COMPLETION)
    if prompt is None or completion is None:
        missing = PROMPT if prompt is None else COMPLETION
        raise ValueError(f"{where} has no {missing!r}; allowed: a prompt and a completion in every row")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise ValueError(f"{where} has an empty completion; allowed: one of which something is learned")
        return PromptCompletion(prompt, completion)
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise ValueError(
            f"{where} has a {type(prompt).__name__} as prompt and a {type(completion).__name__} as completion; "
            "allowed: text in both, or messages in both"
        )
    given = messages_of(prompt, PROMPT, where)
    answer = messages_of(completion, COMPLETION, where)
    if not any(message["role"] == ASSISTANT for message in answer):
        raise ValueError(f"{where} has no message of the assistant in its completion; allowed: at least one")
    return Chat(given + answer, tools, num_given=len(given))


def messages_of(value: Any, column: str, where: str) -> list[Message]:
    """The messages of a column, each of its form.

    Raises:
        ValueError: they are none.
    """
    if not isinstance(value, list) or not value:
        found = "no messages" if value is None or value == [] else f"a {type(value).__name__}"
        raise ValueError(f"{where} has {found} in {column!r}; allowed: a list of messages")
    return [_message(each, f"message {number} of {where}") for number, each in enumerate(value, 1)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is a {type(value).__name__}; allowed: an object with 'role' and 'content'")
    # What is null is not there, as transformers has it: files whose rows share one form are full of it.
    message = {key: item for key, item in value.items() if item is not None}
    if "role" not in message and "from" in message:
        message = _of_share_gpt(message, where)
    if "role" not in message:
        keys = ", ".join(map(repr, message)) or "nothing"
        raise ValueError(f"{where} has no role, only {keys}; allowed: 'role' and 'content', or 'from' and 'value'")
    role = message["role"]
    if role not in ROLES:
        near = nearest(role, ROLES) if isinstance(role, str) else ""
        raise ValueError(f"{where} has the role {role!r}; allowed: {', '.join(ROLES)}{near}")
    if "content" in message:
        return message | {"content": _text(message["content"], where)}
    if role == ASSISTANT and message.get("tool_calls"):
        return message
    raise ValueError(f"{where} has no content; allowed: text, or tool_calls of the assistant")


def _of_share_gpt(turn: Message, where: str) -> Message:
    speaker = turn["from"]
    if speaker not in _FROM:
        raise ValueError(f"{where} is from {speaker!r}; allowed: {', '.join(_FROM)}")
    if "value" not in turn:
        raise ValueError(f"{where} has 'from' but no 'value'; allowed: both")
    rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
    return {"role": _FROM[speaker], "content": turn["value"]} | rest


def _text(content: Any, where: str) -> str:
    """The text of a message. Templates differ in how they join several parts, and may print a list as Python does."""
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], Mapping):
        part = content[0]
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
    if not isinstance(content, str):
        found = f"{len(content)} part(s)" if isinstance(content, list) else f"a {type(content).__name__}"
        raise ValueError(f"{where} has {found} as content; allowed: one text")
    return content


def tools_of(value: Any, where: str) -> list[dict[str, Any]] | None:
    """A list, or one as JSON: schemas differ too much from each other for a column of one type.

    Raises:
        ValueError: they are no list of JSON schemas.
    """
    tools = value
    if isinstance(value, str) and value:
        try:
            tools = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{where} has 'tools' that are not JSON ({error}); allowed: a list of schemas") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where} has 'tools' that are no list of objects; allowed: a list of JSON schemas")
    return tools
