"""What a sweep is made of: its points, their names, flags and DeepSpeed JSONs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from processes import ROOT
from sweeps import point

from mst_ds.config import DEFAULT_DS_CONFIG
from mst_ds.scaling.sweep import short_length
from mst_ds.scaling.sweep_file import read_sweep, train_flags

FILE = """
sp_size: [1, 2]
seq_len: [512, 4K]
num_nodes: 2
variants:
  plain: {}
  cut:
    mst: {mlp_chunks: 4}
    ds_config: {zero_optimization: {stage: 2}}
    train: {max_steps: 7}
train: {max_steps: 3, packing: none}
time_limit: 1.5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(FILE, encoding="utf-8")
    return path


def test_points_are_all_combinations_the_lengths_of_a_curve_together(file: Path) -> None:
    sweep = read_sweep(file)
    assert sweep.time_limit == 1.5
    assert [each.name for each in sweep.points] == [
        f"nodes2-gpus1-sp{sp_size}-{length}-{variant}"
        for variant in ("plain", "cut")
        for sp_size in (1, 2)
        for length in ("512", "4K")
    ]
    assert {each.world_size for each in sweep.points} == {2}


def test_what_is_given_beside_the_file_wins(file: Path) -> None:
    given = {"seq_len": ["1M"], "sp_size": [2, 2], "num_nodes": None, "variants": ["cut"], "time_limit": 9.0}
    sweep = read_sweep(file, given, {"max_steps": "4", "packing": "documents"})
    (only,) = sweep.points
    assert (only.name, sweep.time_limit) == ("nodes2-gpus1-sp2-1M-cut", 9.0)
    # A variant is a variant of what all points have.
    assert sweep.flags(only) == {"max_steps": "7", "packing": "documents"}


def test_without_a_file_there_is_one_variant() -> None:
    sweep = read_sweep(given={"seq_len": ["4K", "4096", "8K"]})
    assert [each.name for each in sweep.points] == ["nodes1-gpus1-sp1-4K-default", "nodes1-gpus1-sp1-8K-default"]
    sweep.check()


def test_the_json_of_a_point(file: Path) -> None:
    sweep = read_sweep(file)
    shipped = json.loads(Path(DEFAULT_DS_CONFIG).read_text(encoding="utf-8"))
    plain, cut = sweep.ds_config(sweep.points[0]), sweep.ds_config(sweep.points[-1])
    assert plain == {**shipped, "mst": {**shipped["mst"], "sp_size": 1}}
    assert cut["zero_optimization"] == {**shipped["zero_optimization"], "stage": 2}
    assert cut["mst"] == {**shipped["mst"], "sp_size": 2, "mlp_chunks": 4}


def test_a_variant_of_an_own_json(file: Path, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    sweep = read_sweep(file, train={"ds_config": str(tmp_path / "own.json")})
    assert sweep.ds_config(sweep.points[0]) == {"zero_optimization": {"stage": 1}, "mst": {"sp_size": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sp_size: 1", "no seq_len is given"),
        ("seq_len: [1K, 1Q]", "seq_len is '1Q'; allowed: a whole number of tokens"),
        ("seq_len: 1K\nsp_size: [0]", "sp_size is 0; allowed: whole numbers >= 1"),
        ("seq_len: 1K\nnum_nodes: []", "num_nodes is an empty list"),
        ("seq_len: 1K\nsp_sizes: [1]", "unknown key 'sp_sizes'; nearest: 'sp_size'"),
        ("seq_len: 1K\ntime_limit: 0", "time_limit is 0; allowed: minutes"),
        ("seq_len: 1K\ntrain: {max_step: 3}", "unknown key 'max_step'; nearest: 'max_steps'"),
        ("seq_len: 1K\ntrain: {output_dir: here}", "unknown key 'output_dir'"),
        ("seq_len: 1K\nvariants: {}", "variants is {}"),
        ("seq_len: 1K\nvariants: {a/b: {}}", "a variant is called 'a/b'"),
        ("seq_len: 1K\nvariants: {a: {mtl: {}}}", "unknown key 'mtl'; nearest: 'mst'"),
        ("seq_len: 1K\nvariants: {a: {mst: {sp_size: 2}}}", "sp_size of the sweep"),
        ("seq_len: [1K", "is not YAML"),
        ("seq_len: 1K\nseq_len: 2K", "sweep.yaml has 'seq_len' twice (line 2); allowed: once"),
        ("seq_len: 1K\nvariants:\n  a: {}\n  a: {train: {max_steps: 7}}", "has 'a' twice (line 4)"),
        ("seq_len: 1K\nvariants: {1: {}, '1': {}}", "has '1' twice (line 2)"),
        ("[1, 2]", "allowed: a mapping"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_sweep(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("mst: {mlp_chunk: 2}", "'mst' has the unknown key 'mlp_chunk'"),
        ("ds_config: {zero_optimization: {stage: 7}}", "stage"),
        ("train: {max_steps: 1}", "max_steps is 1, and the first is not measured"),
        ("train: {packing: some}", "packing"),
        ("train: {model: ./nowhere}", "model './nowhere' was not found"),
    ],
)
def test_a_mistake_of_a_variant_is_found_before_anything_runs(tmp_path: Path, variant: str, message: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"seq_len: 1K\nvariants: {{right: {{}}, wrong: {{{variant}}}}}", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_sweep(path).check()


def test_train_flags_of_a_command_line() -> None:
    assert train_flags(["--max_steps", "3", "--preflight=false"]) == {"max_steps": "3", "preflight": "false"}
    for words, message in (
        (["--max_step", "3"], "nearest: '--max_steps'"),
        (["--max_steps"], "--max_steps has no value"),
        (["--preflight", "--max_steps"], "--preflight has no value"),
        (["3"], "unknown flag '3'"),
        (["--resume", "auto"], "unknown flag '--resume'"),
    ):
        with pytest.raises(ValueError, match=message):
            train_flags(words)


def test_what_no_run_can_have() -> None:
    point(2, num_gpus=2).check_sp_size(4)
    with pytest.raises(ValueError, match="does not divide the world size 3"):
        point(2, num_gpus=3).check_sp_size(4)
    with pytest.raises(ValueError, match="4 query heads"):
        point(8, num_gpus=8).check_sp_size(4)


def test_lengths_as_people_write_them() -> None:
    assert [short_length(length) for length in (500, 1024, 1536, 2**20, 3 * 2**20)] == ["500", "1K", "1536", "1M", "3M"]


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "sweeps").glob("*.yaml")), ids=lambda path: path.name)
def test_the_shipped_sweeps(path: Path) -> None:
    sweep = read_sweep(path)
    assert sweep == read_sweep(Path(path.name))  # in a folder that has no such file
    sweep.check()
    assert len({each.name for each in sweep.points}) == len(sweep.points) > 1
