"""`--report_to`: what wandb and trackio are told, by modules that stand in for them."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from logged import MEMORY, STEP, read_lines, writer

from mst_ds import result_flags
from mst_ds.command_line.entry_point import RequestError
from mst_ds.config_parser import parse_train_config
from mst_ds.metrics import start_trackers


class StandIn(ModuleType):
    """A library that notes how it is called; `__spec__` is where it would be installed."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, origin=f"{name}.py")
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **options: Any) -> Any:
        self.started.append(options)
        return SimpleNamespace(id="the-id", define_metric=lambda *_, **__: None, log=self.log, finish=self.finish)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        values = dict(values)
        self.logged.append((values.pop("train/global_step") if step is None else step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, StandIn]:
    found = {name: StandIn(name) for name in ("wandb", "trackio")}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
        monkeypatch.delenv(f"{name.upper()}_NAME", raising=False)
    return found


def start(folder: Path, *, rank: int = 0, goes_on: bool = False) -> Any:
    folder.mkdir(exist_ok=True)
    names = ["wandb", "tensorboard", "trackio"]
    return start_trackers(names, folder, rank=rank, flags={"seq_len": 64}, goes_on=goes_on)


def test_they_get_what_metrics_jsonl_gets(libraries: dict[str, StandIn], tmp_path: Path) -> None:
    with writer(tmp_path, trackers=start(tmp_path)) as metrics:
        metrics.log_memory(1, MEMORY)
        metrics.log_step(1, **{**STEP, "grad_norm": None})
        metrics.log_eval(1, 2.25)
    expected = []
    for record in read_lines(tmp_path):
        step, tags = record.pop("step"), {}
        for name, value in record.items():
            if isinstance(value, dict):
                tags |= {f"{name}/{phase}": count for phase, count in value.items()}
            elif value is not None:
                tags["eval/loss" if name == "eval_loss" else f"train/{name}"] = value
        expected.append((step, tags))
    for module in libraries.values():
        assert module.logged == expected
        assert module.finished == 1


def test_a_run_that_goes_on_is_the_same_run(libraries: dict[str, StandIn], tmp_path: Path) -> None:
    folder = tmp_path / "books"
    start(folder)
    start(folder)
    start(folder, goes_on=True)
    wandb, trackio = libraries["wandb"].started, libraries["trackio"].started
    assert [each["id"] for each in wandb] == [None, None, "the-id"]
    assert [each["resume"] for each in trackio] == ["never", "never", "allow"]
    for each in (*wandb, *trackio):
        assert (each["project"], each["name"], each["config"]) == ("mst_ds", "books", {"seq_len": 64})


def test_only_the_first_rank_reports(libraries: dict[str, StandIn], tmp_path: Path) -> None:
    assert start(tmp_path, rank=1) == ()
    assert not any(module.started for module in libraries.values())


def test_a_run_that_fails_is_not_finished(libraries: dict[str, StandIn], tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError), writer(tmp_path, trackers=start(tmp_path)):
        raise FloatingPointError
    assert [module.finished for module in libraries.values()] == [0, 0]


def test_a_library_that_does_not_start(
    libraries: dict[str, StandIn], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_account(**options: Any) -> None:
        raise LookupError("No API key configured")

    monkeypatch.setattr(libraries["wandb"], "init", no_account)
    with pytest.raises(RequestError, match="report_to is 'wandb', which does not start: No API key configured"):
        start(tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["wandbb"], "report_to is 'wandbb'; allowed: tensorboard, wandb, trackio, several of them, or none"),
        (["none", "tensorboard"], "report_to is 'none,tensorboard'; allowed"),
        ([""], "report_to is ''; allowed"),
        (["tensorboard", "trackio"], "report_to is 'trackio', which is not installed: install it with pip install tra"),
    ],
)
def test_words_that_are_refused(words: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_flags, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=says):
        parse_train_config(["--report_to", *words])


def test_a_folder_of_runs_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "folder_of_runs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert [result_flags._is_installed(name) for name in ("folder_of_runs", "json")] == [False, True]


def test_words_that_are_taken(libraries: dict[str, StandIn], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("report_to: [wandb, trackio]", encoding="utf-8")
    assert parse_train_config(["--config", str(tmp_path / "run.yaml")]).reports == ("wandb", "trackio")
    assert parse_train_config(["--report_to", "none"]).reports == ()
    assert parse_train_config([]).reports == ("tensorboard",)


def test_without_tensorboard_there_are_no_files_of_it(tmp_path: Path) -> None:
    with writer(tmp_path, tensorboard=False) as metrics:
        metrics.log_step(1, **STEP)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
