"""`--push_to_hub`: refused before data is read, uploaded when the run has ended; the hub is a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import huggingface_hub
import pytest
import torch.distributed as dist
from refusals import TooLateError, too_late, write

import mst_ds.engine
from mst_ds.commands import train
from mst_ds.config_parser import parse_train_config
from mst_ds.data import training_data
from mst_ds.resilience import interruption, watchdog


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--hub_model_id=me/books"], "hub_model_id is 'me/books', but push_to_hub is false; allowed: --push_to_hub"),
        (["--hub_private_repo=true"], "hub_private_repo is True, but push_to_hub is false; allowed: --push_to_hub"),
    ],
)
def test_flags_without_an_upload(flags: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_train_config(flags)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub that notes what is asked of it; `token` and `error` may be set."""
    place = SimpleNamespace(token="a token", error=None, made=[], uploaded=[])

    def create_repo(name: str, **options: Any) -> Any:
        if place.error is not None:
            raise place.error
        place.made.append((name, options))
        return SimpleNamespace(repo_id=f"me/{name.rpartition('/')[2]}")

    def upload_folder(**options: Any) -> Any:
        if place.error is not None:
            raise place.error
        place.uploaded.append(options)
        return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: place.token)
    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    return place


def test_the_repository_is_made_by_the_first_rank_before_data_is_read(
    hub: SimpleNamespace, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(training_data, "load_documents", too_late("load_documents"))
    flags = ["--dataset", write(tmp_path / "text.txt", "some text " * 20), "--seq_len", "64", "--preflight", "false"]
    flags += ["--output_dir", str(tmp_path / "books"), "--push_to_hub", "true"]
    hub.token = None
    assert "no token for the Hugging Face hub is found; allowed: hf auth login, or HF_TOKEN" in refused(*flags)
    hub.token, hub.error = "a token", OSError("403 Forbidden:\nyou may not write.")
    assert "'books' cannot be written: 403 Forbidden: you may not write; allowed: hf auth login" in refused(*flags)
    assert not (tmp_path / "books").exists()
    hub.error = None
    for rank, more in ((0, []), (0, ["--hub_model_id=them/it", "--hub_private_repo=true"]), (1, [])):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        for name, value in (variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}).items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(TooLateError, match="load_documents"):
            train.main([*flags, *more])
    assert hub.made == [
        ("books", {"private": None, "exist_ok": True}),
        ("them/it", {"private": True, "exist_ok": True}),
    ]


def end_of_run(monkeypatch: pytest.MonkeyPatch, folder: Path, *, is_done: bool, repository: str | None) -> int:
    """The exit code of a rank whose steps are another's."""

    def end(code: int) -> None:
        raise SystemExit(code)

    run: Any = SimpleNamespace(config=SimpleNamespace(hang_timeout=9.0), plan=None, launch=SimpleNamespace(rank=0))
    job = train._Job(run, *[None] * 3, folder, repository)  # type: ignore[arg-type]
    monkeypatch.setattr(mst_ds.engine, "meet", lambda run: run)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda objects: None)
    monkeypatch.setattr(watchdog, "Watchdog", nullcontext)
    monkeypatch.setattr(interruption, "Interruption", nullcontext)
    monkeypatch.setattr(train, "_take_steps", lambda job, interruption: is_done)
    monkeypatch.setattr(deepspeed.comm, "destroy_process_group", lambda: None)
    monkeypatch.setattr(train.os, "_exit", end)
    try:
        return train._train_or_end(job, ExitStack())
    except SystemExit as ended:
        return int(ended.code or 0)


def test_the_model_is_uploaded_when_the_run_has_ended(
    hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of_run(monkeypatch, tmp_path, is_done=False, repository="me/books") == 75
    assert end_of_run(monkeypatch, tmp_path, is_done=True, repository=None) == 0
    assert hub.uploaded == []
    assert end_of_run(monkeypatch, tmp_path, is_done=True, repository="me/books") == 0
    folder = tmp_path / "model"
    assert hub.uploaded == [{"repo_id": "me/books", "folder_path": folder, "commit_message": "End of training"}]
    assert capsys.readouterr().out == "uploaded: https://hub/commit\n"
    hub.error = RuntimeError("the network\nis down")
    assert end_of_run(monkeypatch, tmp_path, is_done=True, repository="me/books") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"could not be uploaded to me/books: the network is down; it is in {folder}" in line
    assert f"hf upload me/books {folder} tries again" in line
