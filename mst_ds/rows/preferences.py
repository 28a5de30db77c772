"""A row with two answers, of which one is preferred, or with one and a label: what it must hold, and its one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mst_ds.rows.chats import Chat, Message, PromptCompletion, messages_of, tools_of
from mst_ds.rows.kinds import CHOSEN, LABEL, PROMPT, REJECTED, TOOLS


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, as samples of which the answers are learned."""

    chosen: Chat | PromptCompletion
    rejected: Chat | PromptCompletion


def read_preference(row: Mapping[str, Any], where: str) -> Preference:
    """The two answers of a row: texts or messages with their prompt in a column of its own, or whole chats, whose
    prompt is what they begin with alike, as TRL has it.

    Args:
        where: names the row, for a message: "line 3 of 'pairs.jsonl'".

    Raises:
        ValueError: the row lacks a part, a part is not of its form, or there is nothing to choose between.
    """
    chosen, rejected, prompt = row.get(CHOSEN), row.get(REJECTED), row.get(PROMPT)
    if chosen is None or rejected is None:
        missing = CHOSEN if chosen is None else REJECTED
        raise ValueError(f"{where} has no {missing!r}; allowed: a chosen and a rejected answer in every row")
    if isinstance(chosen, str) and isinstance(rejected, str):
        found = _of_texts(prompt, chosen, rejected, where)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        found = _of_messages(row, chosen, rejected, where)
    else:
        raise ValueError(
            f"{where} has a {type(chosen).__name__} as chosen and a {type(rejected).__name__} as rejected; allowed: "
            "text in both, or messages in both"
        )
    if found.chosen == found.rejected:
        raise ValueError(f"{where} has the same answer as chosen and as rejected; allowed: two different ones")
    return found


def read_label(row: Mapping[str, Any], where: str) -> bool:
    """Whether the answer of a row is desirable.

    Raises:
        ValueError: it does not say.
    """
    label = row.get(LABEL)
    if not isinstance(label, bool):
        raise ValueError(f"{where} has the label {label!r}; allowed: true, of a desirable answer, or false")
    return label


def _of_messages(row: Mapping[str, Any], chosen: list[Any], rejected: list[Any], where: str) -> Preference:
    prompt = row.get(PROMPT)
    answers = [messages_of(value, name, where) for value, name in ((chosen, CHOSEN), (rejected, REJECTED))]
    if not isinstance(prompt, list) and answers[0] == answers[1]:
        raise ValueError(f"{where} has the same answer as chosen and as rejected; allowed: two different ones")
    given = _given(prompt, answers, where)
    tools = tools_of(row.get(TOOLS), where)
    if isinstance(prompt, list):
        answers = [given + answer for answer in answers]
    for name, answer in zip((CHOSEN, REJECTED), answers, strict=True):
        if not any(message["role"] == "assistant" for message in answer[len(given) :]):
            raise ValueError(f"{where} has no answer of the assistant in {name!r}; allowed: at least one")
    return Preference(*(Chat(answer, tools, num_given=len(given)) for answer in answers))


def _of_texts(prompt: Any, chosen: str, rejected: str, where: str) -> Preference:
    if not isinstance(prompt, str):
        found = "no prompt" if prompt is None else f"a {type(prompt).__name__} as prompt"
        raise ValueError(
            f"{where} has {found} and texts as answers; allowed: a text in 'prompt', or chats in 'chosen' and "
            "'rejected'"
        )
    for name, answer in ((CHOSEN, chosen), (REJECTED, rejected)):
        if not answer:
            raise ValueError(f"{where} has an empty answer in {name!r}; allowed: one of which something is learned")
    return Preference(PromptCompletion(prompt, chosen), PromptCompletion(prompt, rejected))


def _given(prompt: Any, answers: Sequence[Sequence[Message]], where: str) -> list[Message]:
    """The messages that are not learned: the prompt's, or those with which both answers begin.

    Raises:
        ValueError: there are none, or the prompt is a text that the answers do not begin with.
    """
    if isinstance(prompt, list):
        return messages_of(prompt, PROMPT, where)
    first, second = answers
    alike = 0
    while alike < min(len(first), len(second)) and first[alike] == second[alike]:
        alike += 1
    if alike == 0:
        raise ValueError(
            f"{where} has answers that begin with different messages and no messages in 'prompt'; allowed: the prompt "
            "in a column of its own, or in both answers"
        )
    # Some datasets repeat as text what the user asked first.
    if prompt is not None and prompt not in [message.get("content") for message in first[:alike]]:
        raise ValueError(
            f"{where} has a prompt, {str(prompt)[:60]!r}, that its answers do not begin with; allowed: messages in "
            "'prompt', or none where the answers are whole chats"
        )
    return list(first[:alike])
