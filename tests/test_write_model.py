"""A model folder is written whole or not at all, with what its source had beside config and weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import full_disk
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import hub

from mst_ds.data.tokenizer import byte_tokenizer
from mst_ds.model_folder.write import fetch_processor_of, write_files_of, write_model


def write(folder: Path, source: str = "small_llama", write_files: Callable[[Path], None] | None = None) -> None:
    model = tiny_llama()
    own = write_files or (lambda partial: write_files_of(model, byte_tokenizer(), source, partial))
    write_model(model, model.state_dict(), folder, write_files=own)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A model folder that is there already."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("an old one", encoding="utf-8")
    return folder


def test_a_folder_takes_the_place_of_another(old: Path) -> None:
    write(old)
    assert AutoModelForCausalLM.from_pretrained(old).num_parameters() == tiny_llama().num_parameters()
    assert AutoTokenizer.from_pretrained(old)("a")["input_ids"] == [97]
    assert [path.name for path in old.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("limit", [100, 5000, 50_000])
def test_a_disk_that_is_full(old: Path, limit: int) -> None:
    """At the config, at the tokenizer, at the weights."""
    with full_disk(limit), pytest.raises(OSError, match=r"model could not be written: .*[Ff]ile too large"):
        write(old)
    assert contents(old.parent) == {"model/config.json": b"an old one"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("a defect")])
def test_a_write_that_is_interrupted(old: Path, error: BaseException) -> None:
    def write_files(partial: Path) -> None:
        assert (partial / "model.safetensors").is_file()
        raise error

    with pytest.raises(type(error)):
        write(old, write_files=write_files)
    assert contents(old.parent) == {"model/config.json": b"an old one"}


def test_what_a_killed_write_has_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for leftover in ("model.mst_ds_partial", "model.mst_ds_replaced", "model.partial"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "config.json").write_text("{}", encoding="utf-8")
    write(tmp_path / "model")
    # The last has a name that anyone may give.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.partial"]


def test_a_kill_between_two_renames_loses_nothing(old: Path) -> None:
    old.rename(old.with_name("model.mst_ds_replaced"))

    def write_files(partial: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(old, write_files=write_files)
    assert contents(old.parent) == {"model/config.json": b"an old one"}


@pytest.mark.parametrize(
    "generation",
    [{"eos_token_id": [5, 9], "do_sample": True, "temperature": 0.6}, {"do_sample": False, "temperature": 0.6}],
    ids=["of several ends", "that transformers does not save"],
)
def test_the_sources_own_files_are_kept(tmp_path: Path, generation: dict[str, object]) -> None:
    source = tmp_path / "source"
    tiny_llama().save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    (source / "preprocessor_config.json").write_text('{"size": 3}', encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.generation_config.max_new_tokens = 9  # what was not changed newer versions save, whatever it is
    write_model(
        model,
        model.state_dict(),
        tmp_path / "model",
        write_files=lambda partial: write_files_of(model, byte_tokenizer(), str(source), partial),
    )
    for name in ("generation_config.json", "preprocessor_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (source / name).read_bytes()
    assert GenerationConfig.from_pretrained(tmp_path / "model").temperature == 0.6
    # An adapter's folder has none of them: they are the model's.
    write_files_of(SimpleNamespace(peft_config={"default": None}), byte_tokenizer(), str(source), tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "tokenizer.json" in names
    assert names.isdisjoint({"generation_config.json", "preprocessor_config.json"})
    # The model's own is as it was.
    assert model.generation_config.temperature == 0.6


def test_an_old_chat_template_is_kept_where_there_is_no_other(tmp_path: Path) -> None:
    """Processors read it. The tokenizer's own may be one that the run has put in its place."""
    (tmp_path / "chat_template.json").write_text('{"chat_template": "old"}', encoding="utf-8")
    model, tokenizer = tiny_llama(), byte_tokenizer()
    for template, is_there in ((None, True), ("new", False)):
        tokenizer.chat_template = template
        folder = tmp_path / str(template)
        write_files_of(model, tokenizer, str(tmp_path), folder)
        assert (folder / "chat_template.json").exists() == is_there


def test_files_of_a_processor_are_got_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    got: list[str] = []

    def cached_file(name: str, file: str, **settings: object) -> None:
        if name == "some/lost":
            raise OSError("no\nnetwork")
        got.append(f"{name}/{file}")

    monkeypatch.setattr(hub, "cached_file", cached_file)
    for source in ("small_llama", str(tmp_path)):
        fetch_processor_of(source)
    assert got == []
    fetch_processor_of("some/model")
    assert {"some/model/preprocessor_config.json", "some/model/processor_config.json"} <= set(got)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json of model 'some/lost' cannot be had: no network"):
        fetch_processor_of("some/lost")
