from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
from datasets.data_files import SPLIT_KEYWORDS

from mst_ds.config import TrainConfig
from mst_ds.data import batching, load_documents, text_source
from mst_ds.dataset_files import SPLIT_WORDS


def texts(path: Path | str, **flags: str) -> list[str]:
    loaded = load_documents(TrainConfig(dataset=str(path), **flags))
    assert loaded.column_names == ["text"]
    return list(loaded["text"])


def write_jsonl(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refusal(path: Path | str, **flags: str) -> str:
    with pytest.raises(ValueError, match="allowed: ") as caught:
        load_documents(TrainConfig(dataset=str(path), **flags))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_stdlib_is_every_source_file_without_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "# " + "x" * 2048
    kept = ["b.py", "a/z.py", "a/a.py", "unittest/case.py"]
    left_out = [
        "site-packages/p.py",
        "test/t.py",
        "a/tests/t.py",
        "a/idle_test/t.py",
        "__pycache__/c.py",
        "a/notes.txt",
    ]
    for name in kept + left_out:
        file = tmp_path / "stdlib" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# {name}\n{source}")
    (tmp_path / "stdlib" / "short.py").write_text("pass")
    (tmp_path / "stdlib" / "latin.py").write_bytes(b"# \xe9" + source.encode())
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))

    assert texts("python_stdlib") == [f"# {name}\n{source}" for name in sorted(kept)]


def test_stdlib_of_this_python_is_megabytes_of_text() -> None:
    text = "".join(texts("python_stdlib"))

    assert "def getsourcefile(object):" in text
    assert len(text) > 2**20


def test_each_txt_file_is_one_document(tmp_path: Path) -> None:
    folder = tmp_path / "books [1]*"
    (folder / "more").mkdir(parents=True)
    (folder / "b.txt").write_text("two\n\nparagraphs\n")
    (folder / "a.txt").write_text("one")
    (folder / "more" / "c.TXT").write_text("three")
    (folder / "README.md").write_text("not read")
    (folder / ".hidden.txt").write_text("not read")

    assert texts(folder / "b.txt") == ["two\n\nparagraphs\n"]
    assert texts(folder) == ["one", "two\n\nparagraphs\n", "three"]


def test_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    assert texts(file) == ["before"]
    file.write_text("after it")
    assert texts(file) == ["after it"]


def test_each_jsonl_row_is_one_document_and_the_column_is_chosen(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"id": 1, "body": "x"}, {"id": 2, "body": "y"})

    assert texts(file, text_column="body") == ["x", "y"]
    assert texts(file, text_column="body", dataset_split="train[1:]") == ["y"]


def test_parquet_files_of_a_folder_follow_each_other(tmp_path: Path) -> None:
    for name in ("b", "a"):
        datasets.Dataset.from_dict({"text": [name]}).to_parquet(tmp_path / "rows" / f"{name}.parquet")

    assert texts(tmp_path / "rows") == ["a", "b"]


def test_column_of_large_strings_is_text(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("large_string")})
    datasets.Dataset.from_dict({"text": ["x"]}, features=features).to_parquet(tmp_path / "a.parquet")

    assert texts(tmp_path / "a.parquet") == ["x"]


def test_missing_column_names_the_columns(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"id": 1, "texts": "x"})

    message = refusal(file)

    assert "text_column is 'text'" in message
    assert "allowed: 'id', 'texts'; nearest: 'texts'" in message


@pytest.mark.parametrize("value", [7, ["x"], {"role": "user"}])
def test_column_that_is_no_text_is_refused(tmp_path: Path, value: object) -> None:
    assert "allowed: a column of text" in refusal(write_jsonl(tmp_path / "a.jsonl", {"text": value}))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
def test_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()

    assert "is empty" in refusal(tmp_path / name)


def test_dataset_without_rows_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "a.parquet")

    assert "corresponds to no data" in refusal(tmp_path / "a.parquet")


def test_unknown_extension_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("text\nx\n")

    (tmp_path / "a.parquet.gz").write_text("x")

    for path in (tmp_path / "a.xml", tmp_path / "a.parquet.gz", tmp_path):
        assert "allowed: a .txt, .jsonl, .json, .csv, .parquet file or a folder of them" in refusal(path)


def test_folder_of_two_kinds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    write_jsonl(tmp_path / "b.jsonl", {"text": "x"})

    assert ".jsonl and .txt files" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "nowhere.jsonl", "nowhere.csv.gz"])
def test_missing_file_is_refused_without_asking_the_hub(name: str) -> None:
    assert "no such file or folder exists" in refusal(name)


def test_file_that_is_not_what_its_name_says_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text: "y"}\n')
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")

    assert "line 2 of " in refusal(tmp_path / "a.jsonl")
    assert "is not JSON in UTF-8 (Expecting ':'" in refusal(tmp_path / "a.jsonl")
    assert "can't decode byte 0xff" in refusal(tmp_path / "a.txt")


def test_lines_of_a_text_end_as_python_reads_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa\r\nb\rc\n\r\0é🎉".encode())
    assert texts(tmp_path / "a.txt") == [(tmp_path / "a.txt").read_text()] == ["\ufeffa\nb\nc\n\n\0é🎉"]


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_few_long_documents_are_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What is read is written, and forgotten, before more is read: 1000 at once were gigabytes."""
    monkeypatch.setattr(batching, "BYTES_AT_ONCE", 1000)
    long = [str(number) * 400 for number in range(10)]
    (tmp_path / "data").mkdir()
    if kind == "jsonl":
        write_jsonl(tmp_path / "data" / "a.jsonl", *({"text": text} for text in long))
    for number, text in enumerate(long if kind == "txt" else []):
        (tmp_path / "data" / f"{number}.txt").write_text(text)
    loaded = load_documents(TrainConfig(dataset=str(tmp_path / "data")))
    assert list(loaded["text"]) == long
    at_once = [len(chunk) for chunk in loaded.data.column("text").chunks]
    assert max(at_once) <= 3, "a longest one, and others of 1000 bytes"


def test_unknown_split_is_refused_with_the_splits_there_are(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"text": "x"})

    said = "has no split 'validation'; allowed: 'train', or a part of one as 'train[:90%]'"
    assert said in refusal(file, dataset_split="validation")
    assert said in refusal(file, dataset_split="train[:1]+validation[1:]")
    assert "has no split 'train[:x]' (Unrecognized" in refusal(file, dataset_split="train[:x]")


def test_name_that_the_hub_does_not_give_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    message = refusal("python_stdlb", dataset_config="en")

    assert "dataset 'python_stdlb' cannot be loaded (Couldn't reach" in message
    assert "allowed: 'python_stdlib', a .txt" in message


def test_id_configuration_and_split_reach_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: str, **kwargs: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"url": ["x"], "text": [f"{args} {kwargs}"]})

    monkeypatch.setattr(text_source, "load_dataset", load_dataset)

    assert texts("owner/name", dataset_config="en", dataset_split="test") == ["('owner/name', 'en') {'split': 'test'}"]


def test_reason_of_several_lines_is_given_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: str, **kwargs: str) -> datasets.Dataset:
        raise ValueError("Config name is missing.\nPlease pick one among: ['de', 'en']")

    monkeypatch.setattr(text_source, "load_dataset", load_dataset)

    assert "(Config name is missing. Please pick one among: ['de', 'en'])" in refusal("owner/name")


def test_column_that_is_not_needed_may_hold_anything(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "a.jsonl", {"meta": "y"}, {"text": "x", "meta": {"a": "b"}}, {"text": "z", "meta": [1]}
    )

    assert texts(file) == [None, "x", "z"]


def test_parquet_column_that_is_not_needed_may_change(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"], "meta": [1]}).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"text": ["b"], "meta": [{"b": "c"}]}).to_parquet(tmp_path / "b.parquet")

    assert texts(tmp_path) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": 7}', "has a int in 'text', 7; allowed: a column of text; nearest: quotation marks"),
        (b'{"text": 7, "body": "words"}', "7; allowed: a column of text; nearest: --text_column body"),
        (b'["x"]', "is not an object"),
        (b'{"text": "\xff"}', "is not JSON in UTF-8 ('utf-8' codec can't decode byte 0xff"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "is not JSON in UTF-8 (maximum recursion"),
    ],
)
def test_wrong_line_is_refused_with_its_number(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n\n' + line)

    message = refusal(tmp_path / "a.jsonl")

    assert f"line 3 of '{tmp_path}/a.jsonl' " in message
    assert reason in message


def test_byte_order_mark_line_ends_and_nul_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\nb"}\r\n{"text": "c\\u0000d \\ud83c\\udf89"}\r\n')

    assert texts(tmp_path / "a.jsonl") == ["a\r\nb", "c\0d 🎉"]


@pytest.mark.parametrize("names", [("train.jsonl", "test.jsonl"), ("train/0.jsonl", "test/0.jsonl")])
def test_files_named_for_splits_are_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, {"text": name}, {"text": "second"})

    assert texts(tmp_path) == [names[0], "second"]
    assert texts(tmp_path, dataset_split="test[:1]") == [names[1]]
    assert texts(tmp_path, dataset_split="all") == [names[0], "second", names[1], "second"]
    assert "allowed: 'train', 'test'" in refusal(tmp_path, dataset_split="validation")


def test_parquet_and_text_files_named_for_splits_are_splits(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / "books").mkdir(exist_ok=True)
        (tmp_path / "books" / f"{name}.txt").write_text(name)
        datasets.Dataset.from_dict({"text": [name]}).to_parquet(tmp_path / "rows" / f"{name}.parquet")

    for folder in ("books", "rows"):
        assert texts(tmp_path / folder) == ["train"]
        assert texts(tmp_path / folder, dataset_split="test") == ["test"]
        assert texts(tmp_path / folder, dataset_split="all") == ["train", "test"]


def test_words_that_name_a_split_are_those_of_datasets() -> None:
    assert {str(split): words for split, words in SPLIT_KEYWORDS.items()} == SPLIT_WORDS


@pytest.mark.parametrize("other", ["the story.txt", "train of test.txt"])
def test_file_of_no_one_split_beside_splits_is_refused(tmp_path: Path, other: str) -> None:
    for name in ("test.txt", other):
        (tmp_path / name).write_text("x")

    assert f"but {other!r} is of " in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", ["body", "messages"])
def test_chats_where_text_is_asked_for_are_refused_with_what_to_do(tmp_path: Path, kind: str, column: str) -> None:
    chat = [{"role": "user", "content": "x"}]
    if kind == "jsonl":
        write_jsonl(tmp_path / "a.jsonl", {"messages": chat})
    else:
        datasets.Dataset.from_dict({"messages": [chat]}).to_parquet(tmp_path / "a.parquet")

    refused = refusal(tmp_path / f"a.{kind}", text_column=column)
    assert "; nearest: " in refused
    assert refused.endswith(
        "chats in 'messages', without --text_column" if column == "body" else ", without --text_column"
    )
