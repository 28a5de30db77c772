"""What is found in a model folder: weights that are whole, none at all, or a refusal in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import CONFIG, WEIGHTS, change_config, llama_folder
from safetensors.torch import load_file

from mst_ds.adapters import ADAPTER_FILE
from mst_ds.model_folder import find_weights
from mst_ds.model_shape import load_model_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return llama_folder(tmp_path / "model")


def only(name: str, content: bytes = b"some bytes") -> Callable[[Path], None]:
    """In place of the weights, a file."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)

    return change


def cut_off(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-1000])

    return change


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def cut_off_pickled(folder: Path) -> None:
    pickled(folder)
    cut_off("pytorch_model.bin")(folder)


class Planted:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return print, ("it ran",)


def planted(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"weight": Planted()}, folder / "pytorch_model.bin")


def put(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8") and None


def put_beside(name: str, content: str) -> Callable[[Path], None]:
    """Under another name: a file of weights that has transformers' name is taken before its index."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "all.safetensors")
        put(name, content.replace(WEIGHTS, "all.safetensors"))(folder)

    return change


def twice(folder: Path) -> None:
    shutil.copyfile(folder / WEIGHTS, folder / "1.safetensors")
    (folder / WEIGHTS).rename(folder / "2.safetensors")
    put(INDEX, json.dumps({"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))(folder)


INDEX_OF_TWO = json.dumps(
    {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": WEIGHTS}}
).encode()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (only(INDEX, INDEX_OF_TWO), "lacks 2 of the 2 files that model.safetensors.index.json names"),
        (only(INDEX, b"{}"), "is no index of weights"),
        (only(INDEX, b'{"metadata": {}, "weight_map": {}}'), "is no index of weights"),
        (put_beside(INDEX, json.dumps({"weight_map": {"a": WEIGHTS}})), "is no index of weights"),
        (twice, r"hold lm_head\.weight, .* in 2\.safetensors and in another of its files"),
        (only("consolidated.00.pth"), r"no weights that transformers loads, but consolidated\.00\.pth"),
        (only("original/consolidated.00.pth"), r"but original/consolidated\.00\.pth"),
        (only("model.Q4_K_M.gguf"), r"but model\.Q4_K_M\.gguf"),
        (only("tf_model.h5"), r"but tf_model\.h5"),
        (only("model.fp16.safetensors"), r"but model\.fp16\.safetensors"),
        (only("rust_model.unheard-of"), "but rust_model.unheard-of"),
        (only(".tmpA3k7PR", b""), r"but \.tmpA3k7PR"),
        (only("weights", b"0" * 2**21), "but weights, which may be weights, cut off or in another format"),
        (only("model.ckpt/data", b""), r"but model\.ckpt,"),
        (only(".cache/huggingface/download/x.incomplete"), r"but \.cache/huggingface/download/x\.incomplete"),
        (cut_off(WEIGHTS), r"model\.safetensors are cut off or damaged"),
        (put(WEIGHTS, "no safetensors"), r"model\.safetensors are cut off or damaged"),
        (cut_off_pickled, r"pytorch_model\.bin cannot be read as tensors alone"),
        (planted, r"pytorch_model\.bin cannot be read as tensors alone"),
        (put(WEIGHTS, POINTER), r"model\.safetensors in '.*' is a pointer of Git LFS"),
        (put("tokenizer.json", POINTER), r"tokenizer\.json in '.*' is a pointer of Git LFS"),
        (put(ADAPTER_FILE, "{}"), r"has an adapter beside the model, adapter_config\.json"),
        (
            lambda folder: change_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": 5}),
            "weight_block_size in quantization_config is 5; allowed: two whole numbers",
        ),
        (lambda folder: change_config(folder, transformers_weights="other.safetensors"), "lacks other.safetensors"),
    ],
)
def test_a_folder_that_is_refused(
    folder: Path, change: Callable[[Path], None], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder)
    with pytest.raises(ValueError, match=says) as error:
        find_weights(str(folder))
    assert "\n" not in str(error.value)
    assert "; allowed: " in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "names",
    [[], ["README.md", "LICENSE", ".gitattributes", "tokenizer.json", "tokenizer.model", "modeling_x.py", "a.png"]],
)
def test_a_folder_without_weights(folder: Path, names: list[str]) -> None:
    (folder / WEIGHTS).unlink()
    for name in names:
        (folder / name).write_text("text", encoding="utf-8")
    assert find_weights(str(folder)) is None
    assert find_weights("small_llama") is None


def test_weights_of_every_form(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for change, names in (
        (lambda folder: None, [WEIGHTS]),
        (pickled, ["pytorch_model.bin"]),
        (_shard, ["model-1.safetensors", "model-2.safetensors"]),
    ):
        change(folder)
        weights = find_weights(str(folder))
        assert weights is not None
        assert [file.name for file in weights.files] == names
        assert {name: header.shape for name, header in weights.headers.items()} == shapes


def _shard(folder: Path) -> None:
    """Beside what torch has pickled, which transformers then does not take."""
    from safetensors.torch import save_file

    tensors = torch.load(folder / "pytorch_model.bin")
    files = {name: f"model-{1 + index % 2}.safetensors" for index, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")


def test_weights_of_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its cache, as there is no hub here."""
    cached = tmp_path / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    weights = find_weights("some/model")
    assert weights is not None
    assert [file.name for file in weights.files] == [WEIGHTS]
    (cached / "snapshots" / ("0" * 40) / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="some/model"):
        find_weights("some/model")


@pytest.mark.parametrize(
    ("content", "says"),
    [(POINTER, "is a pointer of Git LFS"), (None, "has an adapter and no model")],
)
def test_a_config_that_is_none(folder: Path, content: str | None, says: str) -> None:
    if content is None:
        (folder / CONFIG).rename(folder / ADAPTER_FILE)
    else:
        (folder / CONFIG).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        load_model_config(str(folder))
