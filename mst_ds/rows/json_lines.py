"""The rows of lines of JSON, and what a row must hold to be of its kind."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from mst_ds.rows.chats import read_row
from mst_ds.rows.kinds import AS_CHAT, COMPLETION, INPUT_IDS, REJECTED, Kind, chat_column
from mst_ds.rows.preferences import read_label, read_preference
from mst_ds.rows.rollouts import read_rollout

# Of a text, for one step of the check that it can be written.
_CHARACTERS_AT_ONCE = 2**20


def lines_of(lines: IO[bytes], file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line that is not blank, with its name for a message, as "line 3 of 'a.jsonl'".

    A line may be as long as a book of books: it is let go as soon as the next form of it is there.

    Raises:
        ValueError: a line is not an object of JSON in UTF-8.
    """
    number = 0
    while line := lines.readline():
        number += 1
        where = f"line {number} of {file!r}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            del line
            if not text:
                continue
            row = json.loads(text)
        except (ValueError, RecursionError) as error:  # of which both decoders' errors are
            raise ValueError(f"{where} is not JSON in UTF-8 ({error}); allowed: one object a line") from None
        del text
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not an object; allowed: one object a line")
        yield where, row
        del row


def look_at(row: Mapping[str, Any], kind: Kind, columns: Sequence[str], where: str) -> None:
    """Refuse a row that is none of this kind; ids are looked at where they are read.

    Raises:
        ValueError: see `text_of` and `json_of`.
    """
    if kind == "text":
        text_of(row, columns[0], where)
    elif kind == "input_ids":
        require_column(row, kind, columns[0], where)
    else:
        json_of(row, kind, columns, where)


def text_of(row: Mapping[str, Any], column: str, where: str) -> str | None:
    """The text of a row; None where it has no such column, or null there. The other columns may hold anything.

    Raises:
        ValueError: the column holds no text, or another line's kind of row is here in its place.
    """
    text = row.get(column)
    if not isinstance(text, str | None):
        of_text = [name for name, value in row.items() if isinstance(value, str)]
        fix = f"--text_column {of_text[0]}" if of_text else "quotation marks around it"
        if isinstance(text, list | dict):
            fix = AS_CHAT
        raise ValueError(
            f"{where} has a {type(text).__name__} in {column!r}, {json.dumps(text)[:60]}; "
            f"allowed: a column of text; nearest: {fix}"
        )
    if text is None and (row.get(chat_column(row) or INPUT_IDS) is not None):
        raise ValueError(
            f"{where} has no {column!r} but {chat_column(row) or INPUT_IDS!r}; allowed: rows of one kind in a dataset"
        )
    if text is not None:
        _require_utf8(text, f"{where} has half a surrogate pair in {column!r}")
    return text


def json_of(row: Mapping[str, Any], kind: Kind, columns: Sequence[str], where: str) -> str:
    """What a chat, a prompt and its completion, or a preference is made of, as JSON; it has been looked at.

    Args:
        columns: those that are read; see `columns_of`.

    Raises:
        ValueError: see `read_row`, `read_preference`, `read_label` and `read_rollout`; or it is a row of another kind.
    """
    require_column(row, kind, columns[0], where)
    read = {name: row[name] for name in columns if name in row}
    if kind == "preference":
        read_preference(read, where)
    elif INPUT_IDS not in read:
        read_row(read, where)
    if kind == "labelled":
        read_label(read, where)
    if kind == "rollout":
        read_rollout(read, where)
    text = json.dumps(read, ensure_ascii=False)
    _require_utf8(text, f"{where} has half a surrogate pair")
    return text


def require_column(row: Mapping[str, Any], kind: Kind, column: str, where: str) -> None:
    """Refuse a row without the column that makes a row of this kind; what halves lack is for others to say."""
    other_half = {"prompt_completion": COMPLETION, "labelled": COMPLETION, "preference": REJECTED}.get(kind)
    if column in row or other_half in row:
        return
    names = ", ".join(map(repr, row)) or "nothing"
    raise ValueError(f"{where} has no {column!r}, only {names}; allowed: rows of one kind in a dataset")


def _require_utf8(text: str, found: str) -> None:
    try:
        for start in range(0, len(text), _CHARACTERS_AT_ONCE):
            text[start : start + _CHARACTERS_AT_ONCE].encode()
    except UnicodeEncodeError:
        raise ValueError(f"{found}, which is no character; allowed: text that can be written in UTF-8") from None
