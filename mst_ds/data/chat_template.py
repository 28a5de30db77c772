"""A tokenizer's chat template: what it writes of a chat, and which characters of that the assistant says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from mst_ds.config import LossOn
from mst_ds.data.training_template import has_trl
from mst_ds.rows.chats import ASSISTANT, Chat, Message

Span = tuple[int, int]
"""The first character, and the one after the last."""

# As transformers looks for them.
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class AnswersNotToldError(ValueError):
    """What is learned of a chat cannot be told from what the template adds to a prompt, as marks would tell it."""


class ChatTemplate:
    """Renders chats as `apply_chat_template` does.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the dataset has chats, but the tokenizer {tokenizer.name_or_path!r} has no chat template; allowed: "
                "--chat_template_path with a file of one, --tokenizer with one that has, or --text_column with a "
                "column of text"
            )
        self._tokenizer = tokenizer

    def text(self, chat: Chat, where: str) -> str:
        """All of the chat.

        Raises:
            ValueError: the template refuses it, or fails, or leaves a message out.
        """
        text = self._render(chat.messages, chat.tools, where)[0]
        for number, message in enumerate(chat.messages, 1):
            # Reasoning at the beginning may be left out, and white space, but not the end.
            last_word = re.findall(r"\w+", message.get("content") or "")[-1:]
            if last_word and last_word[0] not in text:
                raise ValueError(
                    f"the chat template does not write message {number} of {where}, as one does that takes lists of "
                    "texts and pictures; allowed: --chat_template_path with a template that takes texts"
                )
        return text

    def spans(self, chat: Chat, text: str, loss_on: LossOn, where: str) -> list[Span]:
        """The characters of `text`, the chat's own, that are learned.

        These are what the template marks by {% generation %}, where it does. Otherwise they are what it adds to the
        prompt for an answer, the turns before it with add_generation_prompt, when the answer is there: its end of turn
        as well. So both have to be beginnings of the whole chat, letter by letter.

        Args:
            where: names the row, for a message.

        Raises:
            AnswersNotToldError: an answer is no such addition.
            ValueError: the marks are not one for each answer where that is needed, or the last answer is asked for and
                the chat does not end with one.
        """
        if loss_on == "all":
            return [(0, len(text))]
        answers = [number for number, message in enumerate(chat.messages) if message["role"] == ASSISTANT]
        if loss_on == "last_assistant":
            if answers[-1:] != [len(chat.messages) - 1]:
                raise ValueError(
                    f"{where} ends with a message of the {chat.messages[-1]['role']}; allowed: of the assistant, "
                    "where loss_on is 'last_assistant'"
                )
            wanted = answers[-1:]
        else:
            wanted = [number for number in answers if number >= chat.num_given]
        if _GENERATION_MARK.search(self._source(chat.tools)):
            return self._marked(chat, answers, wanted, where)
        return [self._added(chat, number, text, where) for number in wanted]

    def asks_for(self, loss_on: LossOn, chat: Chat) -> bool:
        """Whether spans begin where a prompt ends, so that the ids of the prompt must be a beginning, too."""
        return loss_on != "all" and not _GENERATION_MARK.search(self._source(chat.tools))

    def _marked(self, chat: Chat, answers: Sequence[int], wanted: Sequence[int], where: str) -> list[Span]:
        _, marked = self._render(chat.messages, chat.tools, where, return_assistant_tokens_mask=True)
        if list(wanted) == list(answers):
            return marked
        if len(marked) != len(answers):
            raise ValueError(
                f"the chat template marks {len(marked)} part(s) of {where} as generated, which has {len(answers)} "
                "message(s) of the assistant; allowed: one for each, where only some are learned"
            )
        return [span for number, span in zip(answers, marked, strict=True) if number in wanted]

    def _added(self, chat: Chat, number: int, text: str, where: str) -> Span:
        messages = chat.messages
        this = f"message {number + 1} of {where}"
        prompt, _ = self._render(messages[:number], chat.tools, where, add_generation_prompt=True)
        is_last = number + 1 == len(messages)
        answered = text if is_last else self._render(messages[: number + 1], chat.tools, where)[0]
        if not answered.startswith(prompt):
            raise AnswersNotToldError(
                f"the chat template writes {this} otherwise than as an answer to the messages before it, which end "
                f"with {prompt[-40:]!r} there; allowed: {_with_marks()}"
            )
        if not text.startswith(answered):
            raise AnswersNotToldError(
                f"the chat template writes {this} in another way when more messages follow, as one does that leaves "
                f"out earlier reasoning; allowed: {_with_marks()}; nearest: a row for each answer, with --loss_on "
                "last_assistant"
            )
        return len(prompt), len(answered)

    def _source(self, tools: list[dict[str, Any]] | None) -> str:
        """A tokenizer may have another template for chats with tools."""
        return self._tokenizer.get_chat_template(None, tools)

    def _render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, where: str, **options: Any
    ) -> tuple[str, list[Span]]:
        # `apply_chat_template` gives no characters where the marks are, and this is what it calls.
        render: Any = chat_template_utils.render_jinja_template
        try:
            (text,), spans = render(
                conversations=[messages],
                tools=tools,
                chat_template=self._source(tools),
                **options,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template is a program of its own: whatever it raises is its answer
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"the chat template does not take {where}, up to message {len(messages)} ({reason}); allowed: chats "
                "as the template has them"
            ) from error
        return text, [(start, end) for start, end in spans[0]] if spans else []


def _with_marks() -> str:
    """Which templates mark answers, for a message: TRL's are found by themselves where it is installed."""
    shipped = "" if has_trl() else ", or pip install trl (Python 3.11 or newer), which ships those of many models"
    return f"--chat_template_path with a template that marks answers by {{% generation %}}{shipped}"


def strings_in(value: Any) -> Iterator[str]:
    """Each text in messages or schemas, names of fields as well."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for item in value.items() for part in item for text in strings_in(part))
    elif isinstance(value, list | tuple):
        yield from (text for item in value for text in strings_in(item))


def with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of messages or schemas in which each text is changed, names of fields as well."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): with_strings(item, change) for key, item in value.items()}
    return [with_strings(item, change) for item in value] if isinstance(value, list) else value
