"""From cheap to dear: nothing is read, tokenised or started for a request that something cheaper refuses."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from defects import scale_gradient
from filelock import FileLock
from refusals import GPT2, TINY, TooLateError, model_folder, too_late, write

import mst_ds.engine
import mst_ds.metrics
import mst_ds.zero.config
from mst_ds import result_flags
from mst_ds.commands import train
from mst_ds.config_parser import parse_train_config
from mst_ds.data import training_data
from mst_ds.engine import Launch, prepare
from mst_ds.resilience import watchdog
from mst_ds.structure import mlps


@pytest.mark.parametrize(
    ("file", "content", "flags", "says"),
    [
        ("other.jsonl", "", [], "no such file or folder exists"),
        ("text.xml", "", [], "allowed: a .txt, .jsonl, .json, .csv, .parquet file"),
        ("text.json", '[{"text": 7}]', [], "row 1 of"),
        ("text.csv", "body\na\n", [], "allowed: 'body'"),
        ("text.jsonl", '{"body": "a"}', [], "allowed: 'body'"),
        ("text.jsonl", '{"text": []}', [], "line 1 of"),
        ("text.jsonl", '{"messages": []}', [], "line 1 of"),
        ("text.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}', [], "has preferences in 'chosen'"),
        ("text.jsonl", '{"text": "a"}', ["--loss_on", "all"], "without turns to choose from; allowed: no --loss_on"),
        ("text.txt", "a", ["--dataset_split", "nope"], "has no split 'nope'"),
        ("text.txt", "a", ["README.md:0.5"], "has no weight, but another has"),
        ("text.txt", "a", ["nowhere.csv"], "dataset is 'nowhere.csv', but no such file"),
    ],
)
def test_local_dataset_is_looked_at_before_anything_slow_is_imported(
    file: str,
    content: str,
    flags: list[str],
    says: str,
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mst_ds.engine", None)  # so that importing it fails
    dataset = Path(write(tmp_path / file, content))
    if file.startswith("other"):
        dataset.unlink()

    assert says in refused("--dataset", str(dataset), *flags)


def test_the_json_is_read_and_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(mst_ds.zero.config, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return call

    for name in ("read_json", "resolve"):
        monkeypatch.setattr(mst_ds.zero.config, name, counted(name))
    flags = ["--dataset", write(tmp_path / "text.txt", "some text " * 20), "--seq_len", "64"]
    prepare(parse_train_config([*flags, "--preflight", "false"]), Launch.from_environment())
    assert calls == ["read_json", "resolve"]


def test_a_model_that_would_not_train_exactly(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = ["--dataset", write(tmp_path / "text.txt", "some text " * 20), "--seq_len", "64"]
    flags += ["--output_dir", str(tmp_path / "run")]
    # Those of the weights; hidden states have three dimensions.
    scale_gradient(monkeypatch, mlps, "chunked_mlp", lambda each: each.dim() == 2)
    with monkeypatch.context() as patched:
        patched.setattr(training_data, "load_documents", too_late("load_documents"))
        line = refused(*flags)
    assert "preflight: LlamaForCausalLM is not exact: model.layers." in line
    assert ".mlp" in line
    with pytest.raises(TooLateError, match=r"init_(distributed|process_group)"):
        train.main([*flags, "--preflight", "false"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ds_config", "ds.json"], "which has no fp32"),
        (["--model", "gpt2"], "the model has 63 positions"),
        (["--model", "llama"], "are cut off or damaged"),
        (["--output_dir", "held"], "is that of a run which is going on"),
    ],
    ids=["plan", "positions", "weights", "output_dir"],
)
def test_data_is_read_when_nothing_else_can_refuse_the_run(
    flags: list[str], says: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(tmp_path / "ds.json", {"mst": {"attention": "flash_attention_2"}})
    model_folder(tmp_path / "gpt2", GPT2)
    model_folder(tmp_path / "llama", {"model_type": "llama", **TINY})
    (tmp_path / "held").mkdir()
    monkeypatch.setattr(training_data, "load_documents", too_late("load_documents"))
    others = ["--dataset", write(tmp_path / "text.txt", "some text " * 20), "--seq_len", "64", "--preflight", "false"]
    others += ["--output_dir", str(tmp_path / "run")]
    with FileLock(tmp_path / "held" / ".lock"):
        assert says in refused(*others, flags[0], str(tmp_path / flags[1]))
    with pytest.raises(TooLateError, match="load_documents"):
        train.main(others)
    assert not (tmp_path / "run").exists()


def test_workers_are_forked_before_the_engine_has_states(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Other tests of this process may have left ranks that wait for the next.
    others, forked = set(multiprocessing.active_children()), set()

    def build_engine(run: Any, group: Any) -> None:
        forked.update(set(multiprocessing.active_children()) - others)
        raise TooLateError

    monkeypatch.setattr(mst_ds.engine, "build_engine", build_engine)
    # One rank, which meets nobody.
    monkeypatch.setattr(mst_ds.engine, "meet", lambda run: run)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda objects: None)
    monkeypatch.setattr(watchdog, "Watchdog", nullcontext)
    texts = write(tmp_path / "text.jsonl", '{"text": "some text some text"}\n' * 99)
    flags = ["--dataset", texts, "--seq_len", "64", "--preflight", "false", "--output_dir", str(tmp_path / "run")]
    flags += ["--dataloader_num_workers", "1", "--eval_steps", "10"]
    with pytest.raises(TooLateError):
        train.main(flags)
    assert len(forked) == 2, "one makes batches to train on, one those of evaluations"


def test_a_request_that_can_run_lets_processes_meet(tmp_path: Path) -> None:
    # Without this one, all others would pass with a command that refuses everything, or meets by another way.
    dataset = write(tmp_path / "text.txt", "some text " * 20)
    with pytest.raises(TooLateError, match=r"init_(distributed|process_group)"):
        train.main(["--dataset", dataset, "--seq_len", "64", "--output_dir", str(tmp_path / "run")])


def test_reports_start_before_weights_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[Any, dict[str, Any]]] = []

    def start_trackers(*place: Any, **options: Any) -> Any:
        started.append((place, options))
        return ()

    monkeypatch.setattr(result_flags, "find_spec", lambda name: SimpleNamespace(origin=name))
    monkeypatch.setattr(mst_ds.metrics, "start_trackers", start_trackers)
    monkeypatch.setattr(mst_ds.engine, "build_engine", too_late("build_engine"))
    monkeypatch.setattr(mst_ds.engine, "meet", lambda run: run)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda objects: None)
    monkeypatch.setattr(watchdog, "Watchdog", nullcontext)
    flags = ["--dataset", write(tmp_path / "text.txt", "some text " * 20), "--seq_len", "64", "--preflight", "false"]
    with pytest.raises(TooLateError, match="build_engine"):
        train.main([*flags, "--output_dir", str(tmp_path / "run"), "--report_to", "tensorboard", "wandb"])
    ((place, options),) = started
    assert place == (("tensorboard", "wandb"), tmp_path / "run")
    assert (options["rank"], options["goes_on"], options["flags"]["seq_len"]) == (0, False, 64)
