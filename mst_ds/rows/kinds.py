"""The kind of a dataset's rows, by the names of its columns, which are those of TRL and of ShareGPT."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, TypeAlias

from mst_ds.config import TrainConfig, nearest

Kind: TypeAlias = Literal["input_ids", "chat", "prompt_completion", "preference", "labelled", "rollout", "text"]

TEXT = "text"
INPUT_IDS, LABELS, ATTENTION_MASK = "input_ids", "labels", "attention_mask"
PROMPT, COMPLETION = "prompt", "completion"
CHOSEN, REJECTED = "chosen", "rejected"
LABEL = "label"
ADVANTAGES, OLD_LOGPS = "advantages", "old_logps"
TOOLS = "tools"
CHAT_COLUMNS = ("messages", "conversations", "conversation")
# Rows of a file of text that are more than a text: the row as JSON, and where it stands.
JSON, WHERE = "json", "where"
# What to do instead where a column of text is asked for and chats are found: as text, their control tokens are letters.
AS_CHAT = "chats in a column 'messages', without --text_column"

# Of objectives other than those of preferences between two.
_KINDS: Mapping[str, Kind] = {"kto": "labelled", "policy": "rollout"}
# They say of ids what is not read: which are learned, and where documents begin.
_NOT_READ_OF_IDS = ("completion_mask", "assistant_masks", "position_ids", "seq_lengths")
_READABLE = "a column of text, 'messages', 'prompt' with 'completion', or 'input_ids'"


def kind_of(config: TrainConfig, names: Collection[str]) -> Kind | None:
    """The kind of rows with these columns; None where they are of no kind. `--text_column` wins where it is given.

    Ids are what a user has made of the other columns, and a chat is what its text was made of: in this order. Where the
    objective is about preferences, rows are these or nothing.
    """
    if config.has_answers:
        kind = _KINDS.get(config.objective, "preference")
        return kind if all(name in names for name in _needed(kind, names)) else None
    if asks_for_text(config):
        return "text" if config.text_column in names else None
    if INPUT_IDS in names:
        return "input_ids"
    if chat_column(names) is not None:
        return "chat"
    if PROMPT in names and COMPLETION in names:
        return "prompt_completion"
    return "text" if config.text_column in names else None


def _needed(kind: Kind, names: Collection[str]) -> tuple[str, ...]:
    """The columns that make a row of answers that are compared or weighed."""
    if kind == "preference":
        return CHOSEN, REJECTED
    if kind == "labelled":
        return PROMPT, COMPLETION, LABEL
    return (INPUT_IDS, ADVANTAGES) if INPUT_IDS in names else (PROMPT, COMPLETION, ADVANTAGES)


def asks_for_text(config: TrainConfig) -> bool:
    """Whether the user named the column of text."""
    return "text_column" in config.given or config.text_column != TrainConfig.text_column


def chat_column(names: Collection[str]) -> str | None:
    """The column of chats, if there is one."""
    return next((name for name in CHAT_COLUMNS if name in names), None)


def columns_of(kind: Kind, names: Collection[str], text_column: str) -> list[str]:
    """The columns that are read of rows with these; the first one makes a row of its kind, others may be missing."""
    if kind == "input_ids":
        return [INPUT_IDS, LABELS, ATTENTION_MASK]
    if kind == "prompt_completion":
        return [PROMPT, COMPLETION, TOOLS]
    if kind == "preference":
        return [CHOSEN, REJECTED, PROMPT, TOOLS]
    if kind == "labelled":
        return [LABEL, PROMPT, COMPLETION, TOOLS]
    if kind == "rollout":
        of_ids = INPUT_IDS in names
        answer = [INPUT_IDS, LABELS, ATTENTION_MASK] if of_ids else [PROMPT, COMPLETION, TOOLS]
        return [ADVANTAGES, *answer, OLD_LOGPS]
    chat = chat_column(names)
    return [text_column] if kind == "text" or chat is None else [chat, TOOLS]


def require_kind(config: TrainConfig, names: Sequence[str]) -> Kind:
    """The kind of rows with these columns.

    Raises:
        ValueError: they are of no kind that is trained on, or `--loss_on` is given for rows that have no turns.
    """
    kind = kind_of(config, names)
    if kind is None:
        raise _of_no_kind(config, names)
    if kind == "input_ids":
        for name in _NOT_READ_OF_IDS:
            if name in names:
                raise ValueError(
                    f"dataset {config.dataset_name!r} has {name!r} beside 'input_ids', which is not read; allowed: "
                    "'labels', -100 where nothing is learned, and a document to a row"
                )
    if kind in ("text", "input_ids") and "loss_on" in config.given:
        raise ValueError(
            f"loss_on is {config.loss_on!r}, but dataset {config.dataset_name!r} has rows of {kind!r}, without turns "
            "to choose from; allowed: no --loss_on"
        )
    return kind


def _of_no_kind(config: TrainConfig, names: Sequence[str]) -> ValueError:
    column, dataset = config.text_column, config.dataset_name
    if config.has_answers:
        needed = _needed(_KINDS.get(config.objective, "preference"), names)
        lacking = [name for name in needed if name not in names]
        return ValueError(
            f"objective is {config.objective!r}, but dataset {dataset!r} has no {' and no '.join(map(repr, lacking))}, "
            f"only {', '.join(map(repr, names))}; allowed: rows with {' and '.join(map(repr, needed))}, or another "
            "--objective"
        )
    found = f"text_column is {column!r}, but dataset {dataset!r} has no such column"
    if asks_for_text(config):
        chat = chat_column(names)
        hint = nearest(column, names) if chat is None else f"; nearest: the chats in {chat!r}, without --text_column"
        return ValueError(f"{found}; allowed: {', '.join(map(repr, names))}{hint}")
    preferences = [name for name in (CHOSEN, REJECTED) if name in names]
    if preferences:
        return ValueError(
            f"dataset {dataset!r} has preferences in {' and '.join(map(repr, preferences))}, but objective is 'sft'; "
            f"allowed: --objective dpo, ipo or simpo, or {_READABLE}"
        )
    halves = [name for name in (PROMPT, COMPLETION) if name in names]
    if halves:
        missing = COMPLETION if halves == [PROMPT] else PROMPT
        return ValueError(f"dataset {dataset!r} has {halves[0]!r} but no {missing!r}; allowed: {_READABLE}")
    return ValueError(f"{found}; allowed: {', '.join(map(repr, names))}{nearest(column, names)}")
