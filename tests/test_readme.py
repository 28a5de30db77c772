"""What README and docs say is so: commands, snippets, paths, the picture of the imports."""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from deepspeed.launcher.runner import parse_args as parse_launcher_args
from processes import ROOT, run
from test_imports import imported_parts, modules, name_parts, top
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.session import parse_options as parse_session_options
from benchmarks.step import parse_options
from benchmarks.tokenising import lines as measured_lines
from mst_ds.config import TrainConfig
from mst_ds.config_parser import parse_train_config
from mst_ds.data import byte_tokenizer
from mst_ds.zero import load_ds_config

README = ROOT / "README.md"
FINETUNE = ROOT / "docs" / "finetune.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, *pages: Path) -> list[str]:
    """The blocks of a language on these pages; on all of them where none is given."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [block for page in pages or PAGES for block in fence.findall(page.read_text(encoding="utf-8"))]


def shell_lines(*pages: Path) -> list[list[str]]:
    """Every command of the shell blocks, once, split into words."""
    lines = "".join(blocks("bash", *pages)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in dict.fromkeys(lines)]


def commands(program: str) -> list[list[str]]:
    """Those that begin with `program`, wherever they stand."""
    return [words for words in shell_lines() if words[:1] == [program]]


def assert_flags_are_known(flags: list[str]) -> None:
    assert load_ds_config(parse_train_config(flags).ds_config)["zero_optimization"]


@pytest.fixture(autouse=True)
def in_the_projects_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


OF_A_MODEL = {"pip"}  # it needs a network
OF_A_GPU = {"pip", "benchmarks/gpu_wheels.sh"}  # both need a network, or what was downloaded
OF_A_CLUSTER = {"apt-get", "export", "squeue", "slurm/local/start.sh", "slurm/local/stop.sh"}  # tests/slurm has them


def test_every_shell_command_is_of_a_kind_that_is_tested() -> None:
    known = {"make", "deepspeed", "python", "source", ".venv/bin/pre-commit"} | SHOWN.keys()
    slurm, gpu = (ROOT / "docs" / f"{name}.md" for name in ("slurm", "gpu"))
    assert {words[0] for words in shell_lines(*(set(PAGES) - {slurm, gpu, FINETUNE}))} == known
    assert {words[0] for words in shell_lines(FINETUNE)} == OF_A_MODEL | {"source", "python", "deepspeed"}
    assert {words[0] for words in shell_lines(slurm)} == OF_A_CLUSTER | {"sbatch"}
    assert {words[0] for words in shell_lines(gpu)} == OF_A_GPU | {"python"}
    assert all(os.access(ROOT / word, os.X_OK) for word in OF_A_CLUSTER | OF_A_GPU if "/" in word)


def test_the_session_for_a_gpu() -> None:
    ((_, script, *flags),) = [words for words in shell_lines(ROOT / "docs" / "gpu.md") if words[0] == "python"]
    assert (ROOT / script).is_file()
    options = parse_session_options(flags)
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| ([a-z ]+) \|", page, re.MULTILINE)[1:] == options.sections
    assert f"in {options.budget_seconds:.0f} seconds at most" in page
    named = {name.removeprefix("--") for name in re.findall(r"`(--\w+)`", page)}
    assert named < vars(options).keys()


@pytest.mark.parametrize("language", ["bash", "python", "yaml", "json", "mermaid", "text"])
def test_every_block_is_read(language: str) -> None:
    begun = sum(page.read_text(encoding="utf-8").count(f"```{language}") for page in PAGES)
    assert len(blocks(language)) == begun > 0


def test_no_block_is_of_another_language() -> None:
    begun = {
        word for page in PAGES for word in re.findall(r"^```(\w+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert begun == {"bash", "python", "yaml", "json", "mermaid", "text"}


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= 1500


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
    "mst-plan": (0, "longest sequence that fits"),
    "mst-preflight": (0, "LlamaForCausalLM is exact"),
    "mst-export": (2, "runs/long is no checkpoint"),  # which is not here
    "mst-scale": (0, "results: "),
}


def run_command(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """A command of the package by its module, since this checkout may not be what is installed."""
    return run([sys.executable, "-m", f"mst_ds.commands.{name.removeprefix('mst-')}", *flags], limit=540)


def test_all_commands_of_the_package_are_shown() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    scripts = re.findall(r'^(mst-\w+) = "mst_ds\.commands\.(\w+):cli"$', project, re.MULTILINE)
    assert {f"mst-{module}" for _, module in scripts} == {name for name, _ in scripts} == {*SHOWN, "mst-train"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "mst-scale" else ()) for name in SHOWN]
)
def test_commands_of_the_package(name: str) -> None:
    code, text = SHOWN[name]
    assert commands(name)
    for _, *flags in commands(name):
        done = run_command(name, *flags)
        assert done.returncode == code, done.stdout
        assert text in done.stdout


def first_screen() -> dict[str, list[str]]:
    """The cells of the README's first table by row: ordinary recompute, DeepSpeed ALST, mst_ds."""
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", README.read_text(encoding="utf-8"), re.MULTILINE
    )
    return {re.split("[,:]", name)[0]: cells for name, *cells in rows}


def longest(*flags: str) -> str:
    found = re.search(r"longest sequence that fits: \d+ tokens \((\d+K)\)", run_command("mst-plan", *flags).stdout)
    assert found
    return found[1]


def test_the_planned_lengths_of_the_first_screen() -> None:
    """By the README's own command, as it stands and with the changes that the text beside it names."""
    page = " ".join(README.read_text(encoding="utf-8").split())
    (flags,) = [words[1:] for words in shell_lines(README) if words[0] == "mst-plan"]
    recompute = [*flags, "--ds_config", "benchmarks/recompute.json"]
    assert " ".join(recompute[-2:]) in page
    assert first_screen()["longest sequence"] == [longest(*recompute), "–", longest(*flags)]
    assert f"recompute without sequence parallelism has {longest(*recompute, '--sp_size', '1')}" in page
    plan = json.loads(run_command("mst-plan", *flags, "--json").stdout)
    at = flags.index("--host_memory_gib")
    host = 8 * max(phase["host_bytes"] for phase in plan["phases"]) / 2**30
    assert f"keeps {host:.0f} GiB of activations in the node's {flags[at + 1]} GiB of host memory" in page
    assert f"without host memory it has {longest(*flags[:at], *flags[at + 2 :])}" in page


def test_the_measured_figures_of_the_first_screen() -> None:
    """They are those of the results; docs/benchmarks.md is written from the same files."""
    file = ROOT / "benchmarks" / "results" / "cpu-small-16k-step-cpu.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    (record,) = found["records"]
    results = {result["contender"]: result for result in record["results"]}
    names = ["recompute", "DeepSpeed ALST", "mst_ds"]
    seconds = [statistics.median(results[name]["seconds"]) / record["seq_len"] for name in names]
    screen = first_screen()
    assert screen["time per token"] == [f"{1000 * value:.1f} ms" for value in seconds]
    peaks = [results[name]["peak_bytes"] / 2**30 for name in names]
    assert screen["memory above the weights"] == [f"{value:.2f} GiB" for value in peaks]
    (words,) = [words for words in shell_lines(README) if words[:2] == ["make", "bench"]]
    options = parse_options(shlex.split(words[2].partition("=")[2]))
    assert (options.lengths, options.contenders, options.parts) == ([record["seq_len"]], names, [record["part"]])
    assert options.output == file.relative_to(ROOT)
    assert (found["where"]["threads"], found["where"]["cores"]) == (1, 2)


def test_the_measured_figures_of_the_data() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "cpu-tokenising.json").read_text(encoding="utf-8"))
    speed, memory = measured_lines(found["tokenising"])
    page = " ".join((ROOT / "docs" / "training.md").read_text(encoding="utf-8").split())
    megabytes, times = re.findall(r"^([\d.]+) MB/s, .*: ([\d.]+) times", speed)[0]
    assert f"{megabytes} MB of text a second of one core, {times} times as long" in page
    peak, before = re.findall(r"([\d.]+) GiB resident at the peak, ([\d.]+) before", memory)[0]
    assert f"{peak} GiB of resident memory at the peak, of which {before} are there before" in page
    assert found["tokenising"]["memory"]["fewest_tokens"] >= 2**20


def test_the_loss_curve_is_of_the_run_beside_it(tmp_path: Path) -> None:
    ((_, script, _, picture),) = [words for words in commands("python") if "docs/plot_losses.py" in words]
    metrics = ROOT / "docs" / "finetune" / "metrics.jsonl"
    done = run([sys.executable, script, str(metrics), str(tmp_path / picture)], limit=120)
    assert done.returncode == 0, done.stdout
    assert "<svg" in (tmp_path / picture).read_text(encoding="utf-8")
    records = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    first, *_, last = [record for record in records if "eval_loss" in record]
    said = f"{first['eval_loss']:.2f} (step {first['step']}) to {last['eval_loss']:.2f} (step {last['step']})"
    assert said in " ".join(README.read_text(encoding="utf-8").split())
    (command,) = [words for words in commands("deepspeed") if "/tmp/own_text.jsonl" in words]
    assert parse_train_config(parse_launcher_args(command[1:]).user_args).max_steps == last["step"]


def test_troubleshooting_has_the_words_of_the_messages() -> None:
    page = README.read_text(encoding="utf-8")
    section = page[page.index("## Troubleshooting") : page.index("## Limits")]
    shown = [
        text
        for cell in re.findall(r"^\| (`.*?`,?.*?) \|", section, re.MULTILINE)
        for text in re.findall("`(.*?)`", cell)
    ]
    sources = [*(ROOT / "mst_ds").rglob("*.py"), ROOT / "Makefile"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    parts = [part.strip() for words in shown for part in words.split("…") if part.strip()]
    assert len(parts) >= 6
    assert [part for part in parts if part not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sbatch_commands(page: Path) -> None:
    for _, *words in (words for words in shell_lines(page) if words[:1] == ["sbatch"]):
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


def small_chat_model(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes)).save_pretrained(folder)
    return folder


def test_python_snippets(tmp_path: Path) -> None:
    model = small_chat_model(tmp_path / "model")
    files = []
    for index, text in enumerate(blocks("python")):
        files.append(tmp_path / f"snippet_{index}.py")
        runs = re.sub(r'"runs/\w+/model"', f'"{model}"', text)
        if "GgufConfig" in text:  # of a model that has to be downloaded: its imports alone
            compile(text, files[-1], "exec")
            runs = "".join(re.findall(r"^from .*\n", text, re.MULTILINE))
        files[-1].write_text(runs, encoding="utf-8")
    assert files
    # One process, for the sake of its imports; each snippet has a namespace of its own.
    script = "import runpy, sys\nfor path in sys.argv[1:]:\n    runpy.run_path(path)"
    done = run([sys.executable, "-c", script, *map(str, files)], limit=120)
    assert done.returncode == 0, done.stdout


def test_the_guide_to_a_fine_tune_goes_on_with_what_it_made() -> None:
    page, of_preferences = FINETUNE.read_text(encoding="utf-8").split("\n## Preferences\n")
    runs = [words for program, *words in shell_lines(FINETUNE) if program == "deepspeed"]
    config, preferences = (parse_train_config(parse_launcher_args(words).user_args) for words in runs)
    made, before, chats, after, pairs, both = blocks("python", FINETUNE)
    assert made.count(f'save_pretrained("{config.model}")') == 2
    assert f'model="{config.model}"' in before
    assert after == before.replace(str(config.model), f"{config.output_dir}/model")
    assert f'for model in ("{config.model}", "{preferences.output_dir}/model"):' in both
    # What it prints is of these commands.
    for settings, dataset, part in ((config, chats, page), (preferences, pairs, of_preferences)):
        assert f'open("{settings.dataset_name}", "w"' in dataset
        assert f"step {settings.max_steps}/{settings.max_steps}  loss" in part
        assert f"samples of {settings.sample_len}; {settings.max_steps} steps are" in part
        assert f"; {settings.eval_samples} samples held out\n" in part
        assert f"Done: {settings.output_dir}/metrics.jsonl" in part
    (unpacked,) = [line for line in shell_lines(FINETUNE) if "zipfile" in line]
    (download,) = [line for line in shell_lines(FINETUNE) if "download" in line]
    name, _, version = download[-1].partition("==")
    assert unpacked[-2:] == [f"{unpacked[-1]}/{name.replace('-', '_')}-{version}-py3-none-any.whl", download[-2]]
    assert f'"{unpacked[-1]}/{name.replace("-", "_")}"' in made


def test_yaml_and_json(tmp_path: Path) -> None:
    assert blocks("yaml")
    for text in blocks("yaml"):
        file = tmp_path / "flags.yaml"
        file.write_text(text, encoding="utf-8")
        parse_train_config(["--config", str(file)])
    assert blocks("json")
    for text in blocks("json"):
        load_ds_config(json.loads(text))


def names_in_rows(page: Path) -> set[str]:
    """What stands in code in the first column of a page's tables, where it is one word."""
    rows = re.findall(r"^\| (`.*?`) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}


def test_flags_and_mst_keys_of_the_tables() -> None:
    flags = names_in_rows(ROOT / "docs" / "training.md")
    assert len(flags) > 20
    assert all(name.startswith("--") for name in flags)
    assert {name.removeprefix("--") for name in flags} <= vars(TrainConfig()).keys()
    keys = names_in_rows(README)
    load_ds_config({"mst": dict.fromkeys(keys, "auto")})
    assert len(keys) == 12


def paths_named(page: Path) -> Iterator[str]:
    """What a page links to, and what it names in code that looks like a path of this project."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    yield from (link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link)
    for code in re.findall(r"`([^`\n]+)`", text):
        is_path = re.fullmatch(r"\.?\w[\w.-]*(/[\w.-]+)+/?|\w+/|[\w-]+\.(py|md|toml|yaml|txt)|Makefile", code)
        if is_path and code not in RUN_LEAVES:
            yield code


RUN_LEAVES = {"tensorboard/", "model/", "plots/", "report.md", "runs/books", "runs/long/checkpoints"}
RUN_LEAVES |= {"runs/json/model", "runs/short/model"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths(page: Path) -> None:
    named = list(paths_named(page))
    assert named
    assert [path for path in named if not ((ROOT / path).exists() or (page.parent / path).exists())] == []


def test_the_tree_is_there() -> None:
    (tree,) = [block for block in blocks("text", ROOT / "docs" / "architecture.md") if block.startswith("mst_ds/\n")]
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
