"""The forms of files that hold rows, compressed or not: their documents, and what is wrong in them, by row."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from mst_ds.config import TrainConfig
from mst_ds.data import batching, load_documents
from mst_ds.rows import files

TEXTS = ['a,b "c"\r\nd', "", "é🎉\0", "NA", "7", " x "]


def packed(content: bytes, name: str) -> bytes:
    if name.endswith(".gz"):
        half = len(content) // 2
        return gzip.compress(content[:half]) + gzip.compress(content[half:])
    if name.endswith(".zst"):
        return pa.compress(content, codec="zstd", asbytes=True)  # type: ignore[no-any-return]
    return content


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """By what the name says."""
    if ".csv" in path.suffixes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue()
    elif ".json" in path.suffixes:
        content = json.dumps(rows, indent=1)
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(packed(content.encode(), path.name))
    return path


def loaded(path: Path, **flags: str) -> datasets.Dataset:
    return load_documents(TrainConfig(dataset=str(path), **flags))


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ValueError, match="allowed: ") as caught:
        loaded(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


NAMES = ["a.json", "a.csv", "a.JSON.gz", "a.csv.gz", "a.jsonl.gz", "a.json.zst", "a.csv.zst", "a.jsonl.zst"]


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_those_that_were_written(tmp_path: Path, name: str) -> None:
    if name == "a.JSON.gz":
        path = write(tmp_path / "a.json.gz", [{"id": 1, "text": text} for text in TEXTS]).rename(tmp_path / name)
    else:
        path = write(tmp_path / name, [{"id": 1, "text": text} for text in TEXTS])
    assert loaded(path).column_names == ["text"]
    assert list(loaded(path)["text"]) == TEXTS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz"])
def test_chats_keep_the_form_that_each_has(tmp_path: Path, name: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "x", **more}]} for more in ({}, {"a": 1}, {"a": {"b": "c"}})]
    assert [json.loads(row) for row in loaded(write(tmp_path / name, rows))["json"]] == rows


def test_prompts_of_csv_are_named_by_row(tmp_path: Path) -> None:
    rows = [{"prompt": "two\nlines", "completion": "x"}, {"prompt": "", "completion": "y"}]
    found = loaded(write(tmp_path / "a.csv", rows))
    assert [json.loads(row) for row in found["json"]] == rows
    assert found["where"][1] == f"row 2 of '{tmp_path}/a.csv'"


def test_json_may_be_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf\n{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "b.json").write_bytes(b'\xef\xbb\xbf\n [ {"text": "c"}\n,{"text": "d"} ]\n ')
    assert list(loaded(tmp_path)["text"]) == ["a", "b", "c", "d"]


def test_files_of_a_folder_may_be_compressed_and_splits(tmp_path: Path) -> None:
    write(tmp_path / "rows" / "train.jsonl.gz", [{"text": "a"}])
    write(tmp_path / "rows" / "train-2.jsonl", [{"text": "b"}])
    write(tmp_path / "rows" / "test.jsonl.zst", [{"text": "c"}])
    (tmp_path / "rows" / "dataset_info.json").write_text("{}")
    assert sorted(loaded(tmp_path / "rows")["text"]) == ["a", "b"]
    assert list(loaded(tmp_path / "rows", dataset_split="test")["text"]) == ["c"]


@pytest.mark.parametrize("step", [1, 7])
def test_a_list_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Also where a part ends within a string, a number or what says how a character is written."""
    monkeypatch.setattr(files, "_AT_ONCE", step)
    rows = [{"text": f'"[]{{}}, \\{number} é', "n": [number * 1.5e10, {"a": None}]} for number in range(20)]
    assert [row for _, row in files.rows_of(write(tmp_path / "a.json", rows))] == rows


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_few_long_rows_are_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(batching, "BYTES_AT_ONCE", 1000)
    rows = [{"text": str(number) * 400} for number in range(10)]
    chunks = loaded(write(tmp_path / name, rows)).data.column("text").chunks
    assert max(len(chunk) for chunk in chunks) <= 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'[{"text": "a"}, {"text: "b"}]', "row 2 of 'FILE' is not JSON (Expecting ':' delimiter)"),
        (b'[{"text": "a"}, 7]', "row 2 of 'FILE' is not an object"),
        (b'[{"text": "a"}, null]', "row 2 of 'FILE' is not an object"),
        (b'[{"text": "a"} {"text": "b"}]', "row 2 of 'FILE' is not JSON in UTF-8 ('{\"text\": \"b\"}]' stands where"),
        (b'[{"text": "a"},]', "row 2 of 'FILE' is not JSON (Expecting value)"),
        (b'[{"text": "a"}', "row 2 of 'FILE' is not JSON in UTF-8 (the list has no end)"),
        (
            b'[{"text": "a"}]\n[{"text": "b"}]',
            "row 2 of 'FILE' is not JSON in UTF-8 ('[{\"text\": \"b\"}]' stands behind",
        ),
        (b'[{"text": "a"}, {"text": "\xff"}]', "is not JSON in UTF-8 ('utf-8' codec can't decode"),
        (b'[{"text": ' + b"[" * 100_000, "is not JSON in UTF-8 (maximum recursion"),
        (b'[{"text": "a"}, {"text": 7}]', "row 2 of 'FILE' has a int in 'text'"),
        (b" [ ] ", "is empty"),
        (b'{"text": ["a"]}', "line 1 of 'FILE' has a list in 'text'"),
    ],
)
def test_wrong_json_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.json"
    assert says.replace("FILE", str(path)) in refusal(path, content)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"id,text\n1,a\n2\n", "row 2 of 'FILE' has not the 2 cells of the first row"),
        (b"id,text\n1,a\n2,b,c\n", "row 2 of 'FILE' has not the 2 cells of the first row"),
        (b'id,text\n1,a\n2,"b\n', "row 2 of 'FILE' is not CSV in UTF-8 (unexpected end of data)"),
        (b'id,text\n1,"a"b\n', "row 1 of 'FILE' is not CSV in UTF-8 ("),
        (b"id,text\n1,\xff\n", "is not CSV in UTF-8 ('utf-8' codec can't decode"),
        (b"id,text\n", "is empty"),
        (b"id;text\n1;a\n", "allowed: 'id;text'"),
        (b"input_ids\n[1]\n", "row 1 of 'FILE' has 'input_ids' that are no list of whole numbers"),
    ],
)
def test_wrong_csv_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.csv"
    assert says.replace("FILE", str(path)) in refusal(path, content)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.csv.zst"])
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    numbers = "".join(str(number**5) for number in range(9999))
    content = write(tmp_path / name, [{"text": "a"}, {"text": numbers}]).read_bytes()
    said = f"{str(tmp_path / name)!r} cannot be read ("
    assert said in refusal(tmp_path / name, content[:-2000])
    assert said in refusal(tmp_path / name, b"no such thing")
