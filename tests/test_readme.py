"""What README and docs say is so: commands, snippets, paths, the picture of the imports; and the runs they promise."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.launcher.runner import parse_args as parse_launcher_args
from processes import free_port
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_imports import imported_parts, modules, name_parts, top
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.step import parse_options
from mst_ds.config import TrainConfig, parse_train_config
from mst_ds.data import eval_batches, load_training_data
from mst_ds.model_shape import load_model_config
from mst_ds.topology import Topology
from mst_ds.zero import load_ds_config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def run(command: list[str], *, limit: float) -> subprocess.CompletedProcess[str]:
    """Run in the project's folder. After `limit` seconds it is stopped with all that it has started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{shlex.join(command)} did not end within {limit} s:\n{output}")
    return subprocess.CompletedProcess(command, process.returncode, output)


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Every command of README's shell blocks that begins with `program`, split into words."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for words in map(shlex.split, lines) if words[:1] == [program]]


def assert_flags_are_known(flags: list[str]) -> None:
    assert load_ds_config(parse_train_config(flags).ds_config)["zero_optimization"]


@pytest.fixture(autouse=True)
def in_the_projects_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_shell_command_is_of_a_kind_that_is_tested() -> None:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    known = {"make", "deepspeed", "python", "source", "sbatch", ".venv/bin/pre-commit"}
    assert {words[0] for words in map(shlex.split, lines)} == known
    assert len(blocks("bash")) == README.read_text(encoding="utf-8").count("```bash")


def test_make_targets() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for _, target, *variables in commands("make"):
        assert target in targets
        assert run(["make", "-n", target, *variables], limit=60).returncode == 0
        for variable in variables:
            name, _, value = variable.partition("=")
            assert name == "ARGS"
            if target == "train":
                assert_flags_are_known(shlex.split(value))
            elif target == "bench":
                parse_options(shlex.split(value))
            else:
                assert (ROOT / shlex.split(value)[0]).exists()


SHOWN = {
    "launch/plan.py": (0, "longest sequence that fits"),
    "launch/preflight.py": (0, "LlamaForCausalLM is exact"),
    "launch/export.py": (2, "runs/long is no checkpoint"),  # which is not here
    "launch/scale.py": (0, "results: "),
}


def test_python_commands_are_of_scripts_that_are_run() -> None:
    assert {command[1] for command in commands("python")} == SHOWN.keys()


@pytest.mark.parametrize(
    "script", [pytest.param(script, marks=pytest.mark.slow if "scale" in script else ()) for script in SHOWN]
)
def test_python_commands(script: str) -> None:
    code, text = SHOWN[script]
    for _, _, *flags in (words for words in commands("python") if words[1] == script):
        done = run([sys.executable, script, *flags], limit=540)
        assert done.returncode == code, done.stdout
        assert text in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sbatch_commands(page: Path) -> None:
    lines = "".join(blocks("bash", page)).replace("\\\n", " ").splitlines()
    for _, *words in (words for words in map(shlex.split, lines) if words[:1] == ["sbatch"]):
        script = next(word for word in words if word.endswith(".sbatch"))
        assert (ROOT / script).is_file()
        assert_flags_are_known(words[words.index(script) + 1 :])


def test_deepspeed_commands() -> None:
    assert commands("deepspeed")
    for _, *words in commands("deepspeed"):
        launcher = parse_launcher_args(words)
        assert launcher.user_script == "launch/train.py"
        assert_flags_are_known(launcher.user_args)


def test_environment_commands() -> None:
    makefile, project = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "pyproject.toml"))
    assert commands("source") == [["source", ".venv/bin/activate"]]
    assert "VENV := .venv\n" in makefile
    assert commands(".venv/bin/pre-commit") == [[".venv/bin/pre-commit", "install"]]
    assert "pre-commit>=" in project
    assert (ROOT / ".pre-commit-config.yaml").is_file()


def test_python_snippets(tmp_path: Path) -> None:
    files = []
    for index, text in enumerate(blocks("python")):
        files.append(tmp_path / f"snippet_{index}.py")
        files[-1].write_text(text, encoding="utf-8")
    assert len(files) == README.read_text(encoding="utf-8").count("```python") > 0
    # One process, for the sake of its imports; each snippet has a namespace of its own.
    script = "import runpy, sys\nfor path in sys.argv[1:]:\n    runpy.run_path(path)"
    done = run([sys.executable, "-c", script, *map(str, files)], limit=120)
    assert done.returncode == 0, done.stdout


def test_yaml_and_json(tmp_path: Path) -> None:
    assert blocks("yaml")
    for text in blocks("yaml"):
        file = tmp_path / "flags.yaml"
        file.write_text(text, encoding="utf-8")
        parse_train_config(["--config", str(file)])
    assert blocks("json")
    for text in blocks("json"):
        load_ds_config(json.loads(text))


def test_flags_and_mst_keys_of_the_tables() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    flags = {name.removeprefix("--") for name in names if name.startswith("--")}
    assert flags
    assert flags <= vars(TrainConfig()).keys()
    keys = {name for name in names if not name.startswith("--")}
    load_ds_config({"mst": dict.fromkeys(keys, "auto")})
    assert len(keys) == 11


def paths_named(page: Path) -> Iterator[str]:
    """What a page links to, and what it names in code that looks like a path of this project."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    yield from (link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link)
    for code in re.findall(r"`([^`\n]+)`", text):
        is_path = re.fullmatch(r"\.?\w[\w.-]*(/[\w.-]+)+/?|\w+/|[\w-]+\.(py|md|toml|yaml|txt)|Makefile", code)
        if is_path and code not in RUN_LEAVES:
            yield code


RUN_LEAVES = {"tensorboard/", "model/", "plots/", "report.md", "runs/long/checkpoints"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths(page: Path) -> None:
    named = list(paths_named(page))
    assert named
    assert [path for path in named if not ((ROOT / path).exists() or (page.parent / path).exists())] == []


def test_the_tree_is_there() -> None:
    (tree,) = [block for block in blocks("text") if block.startswith("mst_ds/\n")]
    entries = [(len(indent), name) for indent, name in re.findall(r"^( *)(\S+)", tree, re.MULTILINE)]
    package = {name for indent, name in entries if indent}
    assert package == {
        path.name + "/" * path.is_dir()
        for path in (ROOT / "mst_ds").iterdir()
        if not path.name.startswith("__") and path.name != "py.typed"
    }
    assert all((ROOT / name).exists() for indent, name in entries if not indent)


def closure(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """For each module what it imports, directly or through others."""

    def reach(name: str) -> set[str]:
        return imports[name].union(*(reach(other) for other in imports[name]))

    return {name: reach(name) for name in imports}


def test_the_picture_shows_the_imports() -> None:
    actual: dict[str, set[str]] = {top(name_parts(path)): set() for path in modules()}
    for path in modules():
        own = top(name_parts(path))
        actual[own] |= {top(parts) for parts in imported_parts(path) if parts[0] == "mst_ds"} - {own}
    picture, _ = blocks("mermaid", ROOT / "docs" / "architecture.md")
    drawn: dict[str, set[str]] = {name: set() for name in actual}
    for lower, upper in re.findall(r"^ +(\w+) --> (\w+)", picture, re.MULTILINE):
        drawn[upper].add(lower)
    assert closure(drawn) == closure(actual)


STEPS, SEQ_LEN, EVAL_SAMPLES = 3, 256, 3
FLAGS = f"--max_steps {STEPS} --seq_len {SEQ_LEN} --eval_steps 2 --eval_samples {EVAL_SAMPLES}".split()


@dataclass(frozen=True)
class FinishedRun:
    folder: Path
    output: str

    def records(self, key: str) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if key in record]


DS_CONFIGS = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name != "zero3_mst.json" else ()) for name in DS_CONFIGS],
)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The command that `make train` ends up at, with each of the JSONs that "run as they are"."""
    folder = tmp_path_factory.mktemp("run") / "output"
    launcher = ["deepspeed", "--num_gpus", "2", "--master_port", free_port()]
    ds_config = f"ds_configs/{request.param}"
    # The first run on a machine compiles for a minute and tokenises for another.
    done = run([*launcher, "launch/train.py", "--ds_config", ds_config, *FLAGS, "--output_dir", str(folder)], limit=540)
    assert done.returncode == 0, done.stdout
    return FinishedRun(folder, done.stdout)


def test_a_run_writes_its_metrics(finished: FinishedRun) -> None:
    steps, evaluations = finished.records("loss"), finished.records("eval_loss")
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert [record["step"] for record in evaluations] == [2, 3]
    for record in steps:
        assert record.keys() >= {"step", "loss", "tokens_per_second", "grad_norm", "lr", "memory_bytes"}
        assert all(value > 0 for name, value in record.items() if name != "skipped_steps")
        assert record["skipped_steps"] == 0
    assert steps[-1]["loss"] < steps[0]["loss"]
    summary = json.loads((finished.folder / "summary.json").read_text(encoding="utf-8"))
    assert (summary["steps"], summary["final_loss"]) == (STEPS, steps[-1]["loss"])
    assert summary["plan"]["topology"]["sp_size"] == 2
    events = EventAccumulator(str(finished.folder / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([step["loss"] for step in steps])
    assert "evaluation loss" in finished.output


def test_a_run_leaves_a_model_that_others_load(finished: FinishedRun) -> None:
    folder = finished.folder / "model"
    text = (folder / "config.json").read_text(encoding="utf-8")
    assert "attn_implementation" not in text
    assert "ulysses" not in text
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("def main(", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False, eos_token_id=-1).shape == (1, 9 + 4)
    # Loaded as any model is, it has the loss that the run's last evaluation measured: fp32, other sums.
    expected = finished.records("eval_loss")[-1]["eval_loss"]
    assert held_out_loss(model) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def held_out_loss(model: Any) -> float:
    """The plain model's mean loss over the tokens that the run held out of training."""
    config = TrainConfig(max_steps=STEPS, seq_len=SEQ_LEN, eval_steps=2, eval_samples=EVAL_SAMPLES)
    held_out = load_training_data(config, load_model_config(config.model)).held_out
    assert held_out is not None
    (batch,) = eval_batches(held_out, Topology(0, 1, 1), micro_batch_size=EVAL_SAMPLES)
    logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten()).item()
