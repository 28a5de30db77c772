"""The training template that TRL ships beside a chat template that it knows: one that marks answers."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

_SUFFIX = "_training_chat_template"


class TrainingTemplate(NamedTuple):
    """name: TRL's, as "qwen3"."""

    name: str
    template: str


def has_trl() -> bool:
    """Whether TRL is installed; it is not imported for that."""
    return find_spec("trl") is not None


def training_template(tokenizer: PreTrainedTokenizerBase) -> TrainingTemplate | None:
    """What TRL trains with in place of the tokenizer's own template, which it compares letter by letter.

    None where TRL is not installed or does not know the template, and for a tokenizer that has several.
    """
    if not has_trl() or not isinstance(tokenizer.chat_template, str):
        return None
    # It takes part of a second to import, of which most chats have no need.
    from trl import chat_template_utils

    try:
        template = chat_template_utils.get_training_chat_template(tokenizer)
    except Exception:  # it knows none, or a template, which is a program of its own, failed when it was tried
        return None
    named = {value: name for name, value in vars(chat_template_utils).items() if name.endswith(_SUFFIX)}
    return None if template is None else TrainingTemplate(named[template].removesuffix(_SUFFIX), template)
