"""The command that plans: a table, JSON, a picture; exit code 0 fits, 1 does not, 2 cannot be planned."""

import json
import subprocess
import sys

import pytest
from processes import ROOT

from mst_ds.commands import plan as plan_command
from mst_ds.config import GIB
from mst_ds.planner import longest_seq_len, make_plan

DS_CONFIG = "ds_configs/zero3_mst.json"
LLAMA_8B = ("--model", "meta-llama/Llama-3.1-8B", "--num_gpus", "8", "--gpu", "H100")
# What a laptop would wait for, or does not have.
UNWANTED = ("torch", "transformers", "deepspeed", "matplotlib")


def run(*flags):
    """The command in a process of its own, which says at the end what it imported of `UNWANTED`."""
    program = (
        "import runpy\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"finally:\n    print([name for name in {UNWANTED} if name in sys.modules], file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", f"import sys\nsys.argv = {['launch/plan.py', *flags]!r}\n{program}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def refuse(capsys, *flags):
    """The one line of a refusal, in this process: what is imported is told apart by `run`."""
    assert plan_command.main(flags) == 2
    done = capsys.readouterr()
    (error,) = done.err.splitlines()
    assert done.out == ""
    assert error.startswith("mst-plan: error: ")
    return error


def test_a_known_model_is_planned_without_torch_and_transformers():
    done = run(*LLAMA_8B, "--num_nodes", "64", "--host_memory_gib", "1900", "--seq_len", "1M")
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert "rank 0 of 512, dp 64: 131072 of 1048576 tokens" in done.stdout
    assert "fits in" in done.stdout


def test_json_is_the_plan():
    done = run(*LLAMA_8B, "--host_memory_gib", "800", "--seq_len", "512K", "--json")
    found = json.loads(done.stdout)
    arguments = {"world_size": 8, "device_memory": 79 * GIB, "reserve": 2 * GIB, "host_memory": 100 * GIB}
    plan = make_plan(LLAMA_8B[1], ROOT / DS_CONFIG, seq_len=512 * 1024, **arguments)
    for name in ("fits", "peak_bytes", "host_bytes", "mlp_chunks", "loss_chunks", "recompute", "seq_len"):
        assert found[name] == getattr(plan if hasattr(plan, name) else plan.settings, name)
    assert found["peak_phase"] == plan.peak_phase.name
    assert found["max_seq_len"] == longest_seq_len(LLAMA_8B[1], ROOT / DS_CONFIG, **arguments)
    assert [phase["name"] for phase in found["phases"]] == [phase.name for phase in plan.phases]
    assert [[term["formula"] for term in phase["terms"]] for phase in found["phases"]] == [
        [term.formula for term in phase.terms] for phase in plan.phases
    ]
    for phase in found["phases"]:
        for place in ("device", "host"):
            terms = [term["bytes"] for term in phase["terms"] if term["place"] == place]
            assert sum(terms) == phase[f"{place}_bytes"]


def test_the_longest_sequence_and_what_is_longer():
    longest = json.loads(run(*LLAMA_8B, "--max_seq_len", "--json").stdout)
    assert longest["seq_len"] == longest["max_seq_len"]
    assert longest["fits"]
    done = run(*LLAMA_8B, "--seq_len", str(longest["seq_len"] + 1024))
    assert done.returncode == 1
    assert "does NOT fit" in done.stdout
    assert f"longest sequence that fits: {longest['seq_len']} tokens" in done.stdout
    states = make_plan("Qwen/Qwen3-8B", ROOT / DS_CONFIG, world_size=1, seq_len=1024, device_memory=GIB).phases[0]
    just_the_states = str(states.device_bytes / GIB + 2.01)
    nothing = run("--model", "Qwen/Qwen3-8B", "--device_memory_gib", just_the_states, "--max_seq_len")
    assert nothing.returncode == 1
    assert "\nno sequence fits\nto make it fit, one of:\n" in nothing.stdout


def test_the_longest_sequences_on_more_nodes():
    points = json.loads(run(*LLAMA_8B, "--num_nodes", "3", "--table", "--json").stdout)
    sizes = {1: (1, 2, 4, 8), 2: (1, 2, 4, 8, 16), 3: (1, 2, 3, 4, 6, 8, 12, 24)}
    assert [(point["num_nodes"], point["sp_size"]) for point in points] == [
        (num_nodes, sp_size) for num_nodes, of_nodes in sizes.items() for sp_size in of_nodes
    ]
    arguments = {"world_size": 24, "device_memory": 79 * GIB, "reserve": 2 * GIB, "ranks_per_node": 8, "sp_size": 12}
    (point,) = (point for point in points if point["sp_size"] == 12)
    assert point["max_seq_len"] == longest_seq_len(LLAMA_8B[1], ROOT / DS_CONFIG, **arguments)
    table = run(*LLAMA_8B, "--num_nodes", "3", "--table", "--sp_size", "12")
    assert table.returncode == 0
    assert f"{point['max_seq_len'] // 1024}" in table.stdout
    assert "sp 24" not in table.stdout


def test_a_picture(tmp_path):
    done = run(*LLAMA_8B, "--seq_len", "128K", "--plot", str(tmp_path / "plan.png"))
    assert done.returncode == 0
    assert done.stdout.endswith(f"picture: {tmp_path / 'plan.png'}\n")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


DRY_RUN = ("--model", "meta-llama/Llama-3.2-1B", "--gpu", "H100", "--seq_len", "8K", "--trace")


def test_a_dry_run_stands_beside_the_formulas():
    found = json.loads(run(*DRY_RUN, "--json").stdout)["trace"]
    assert list(found) == ["forward", "loss", "backward"]
    planned, measured = (max(phase[f"{kind}_bytes"] for phase in found.values()) for kind in ("planned", "dry_run"))
    assert planned == pytest.approx(measured, rel=0.02)


@pytest.mark.slow
def test_a_dry_run_is_a_column_of_the_table():
    assert "dry run GiB" in run(*DRY_RUN).stdout


def test_times_are_predicted_by_the_rates_of_a_named_gpu_and_of_no_other(capsys):
    flags = ("--model", LLAMA_8B[1], "--num_gpus", "8", "--device_memory_gib", "79", "--seq_len", "300K", "--sp_size")
    assert plan_command.main([*flags, "1", "--gpu", "H100", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {"sp_size": 2} in [change["settings"] for change in found["changes_that_fit"]]
    assert found["predicted_step_seconds"] > 0
    assert 0 < found["predicted_mfu"] < 1
    assert plan_command.main([*flags, "8"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[1] == (
        "no time is predicted, as rates are not known: --gpu H100 or another's name, or --rates FILE"
    )
    assert "s a step" not in text


REFUSED = {
    "no length": ([*LLAMA_8B], "one of the arguments --seq_len --max_seq_len --table is required"),
    "two lengths": ([*LLAMA_8B, "--seq_len", "1M", "--max_seq_len"], "--max_seq_len: not allowed with"),
    "states do not fit": (["--model", LLAMA_8B[1], "--gpu", "L4", "--seq_len", "4K"], "the model states of a rank"),
    "no memory": (["--seq_len", "1M"], "device_memory is not known; allowed: --gpu H100 or another's name, --gpu auto"),
    "unknown gpu": (["--seq_len", "1M", "--gpu", "H101"], "gpu is 'H101'; nearest: 'H100'"),
    "gpu of another kind": (
        ["--seq_len", "1M", "--gpu", "RTX4090"],
        "H200-NVL, B200, or device_memory_gib for any other, and rates for its times",
    ),
    "no gpu here": (
        ["--seq_len", "1M", "--gpu", "auto"],
        "gpu is 'auto', but this machine has no GPU; allowed: a name",
    ),
    "gpus of other nodes": (
        ["--seq_len", "1M", "--gpu", "H100", "H200", "--num_nodes", "3"],
        "gpu has 2 values for 3 nodes; allowed: one, or one for each node",
    ),
    "gpus of a table": (
        ["--table", "--gpu", "H100", "H200", "--num_nodes", "2"],
        "gpu has a value for each node, and a table is of many numbers of nodes; allowed: one",
    ),
    "two gpus": (["--seq_len", "1M", "--gpu", "H100", "--rates", "x"], "gpu and rates each say which GPU"),
    "no rates": (["--seq_len", "1M", "--rates", "/none.json"], "rates is '/none.json'; allowed: a JSON file with"),
    "no tokens": ([*LLAMA_8B, "--seq_len", "1M", "--tokens", "0"], "tokens is 0; allowed: 1 to 1e+18, such as 1e9"),
    "endless tokens": ([*LLAMA_8B, "--seq_len", "1M", "--tokens", "1e30"], "tokens is 1e+30; allowed: 1 to 1e+18"),
    "negative price": (
        [*LLAMA_8B, "--seq_len", "1M", "--price_per_gpu_hour", "-1"],
        "price_per_gpu_hour is -1; allowed",
    ),
    "a mix of more than all": (
        [*LLAMA_8B, "--seq_len", "8K:0.9", "128K:0.2"],
        "seq_len is '8K:0.9 128K:0.2', whose shares sum to 1.1; allowed: shares > 0 that sum to 1",
    ),
    "a mix with a length alone": (
        [*LLAMA_8B, "--seq_len", "8K:0.9", "128K"],
        "seq_len is '8K:0.9 128K', of which one has no share of tokens; allowed: shares such as 8K:0.9 128K:0.1",
    ),
    "a comparison of lengths": ([*LLAMA_8B, "--compare", "--seq_len", "8K", "1M"], "compare shows plans of one length"),
    "settings of lengths": ([*LLAMA_8B, "--write", "x.json", "--seq_len", "8K", "1M"], "write shows one plan, and"),
    "settings over the given ones": (
        [*LLAMA_8B, "--seq_len", "8K", "--write", DS_CONFIG],
        "which is the ds_config that is planned; allowed: another file",
    ),
    "settings without a name": ([*LLAMA_8B, "--seq_len", "8K", "--write", ""], "write is '.', a folder; allowed: the"),
    "no length in tokens": ([*LLAMA_8B, "--seq_len", "1X"], "seq_len is '1X'; allowed: a whole number of tokens"),
    "negative memory": (["--seq_len", "1M", "--device_memory_gib", "-3"], "device_memory_gib is -3.0; allowed"),
    "endless memory": (["--seq_len", "1M", "--device_memory_gib", "1e300"], "device_memory_gib is 1e+300; allowed"),
    "table of no nodes": ([*LLAMA_8B, "--table", "--num_nodes", "0"], "num_nodes is 0; allowed"),
    "table of no sp": ([*LLAMA_8B, "--table", "--sp_size", "7"], "sp_size is 7, which does not divide"),
    "picture of a table": ([*LLAMA_8B, "--table", "--plot", "/tmp/x.png"], "plot shows one plan, and table makes none"),
    "no memory of the host": ([*LLAMA_8B, "--seq_len", "1M", "--host_memory_gib", "0"], "host_memory_gib is 0.0"),
    "no gpus": (["--seq_len", "1M", "--gpu", "H100", "--num_gpus", "0"], "num_gpus is 0; allowed"),
    "too many shards": ([*LLAMA_8B, "--num_nodes", "8", "--seq_len", "1M", "--sp_size", "64"], "sp_size is 64, but"),
    "no config": ([*LLAMA_8B, "--seq_len", "1M", "--ds_config", "none.json"], "allowed: an existing DeepSpeed JSON"),
    "a folder as config": ([*LLAMA_8B, "--seq_len", "1M", "--ds_config", "/tmp"], "ds_config is '/tmp'; allowed"),
    "config that is no JSON": ([*LLAMA_8B, "--seq_len", "1M", "--ds_config", "README.md"], "README.md is not JSON"),
    "endless name": ([*LLAMA_8B, "--seq_len", "1M", "--ds_config", "a" * 5000], "File name too long"),
    "no length at all": ([*LLAMA_8B, "--seq_len", "0"], "seq_len is 0; allowed: a whole number >= 1"),
    "negative length": ([*LLAMA_8B, "--seq_len", "-5"], "seq_len is -5; allowed: a whole number >= 1"),
    "absurd length": ([*LLAMA_8B, "--seq_len", "9" * 26], "tokens of a rank; allowed: at most 1099511627776"),
    "absurd ranks": ([*LLAMA_8B, "--seq_len", "4K", "--num_nodes", "9" * 12], "allowed: at most 131072 ranks"),
    "negative gpus": (["--seq_len", "1M", "--gpu", "H100", "--num_gpus", "-8"], "num_gpus is -8; allowed"),
    "no nodes": ([*LLAMA_8B, "--seq_len", "1M", "--num_nodes", "0"], "num_nodes is 0; allowed"),
    "half a node": ([*LLAMA_8B, "--seq_len", "1M", "--num_nodes", "1.5"], "--num_nodes: invalid int value: '1.5'"),
    "no sp": ([*LLAMA_8B, "--seq_len", "1M", "--sp_size", "0"], "sp_size is 0, which does not divide"),
    "negative sp": ([*LLAMA_8B, "--seq_len", "1M", "--sp_size", "-2"], "sp_size is -2, which does not divide"),
    "uneven sp": ([*LLAMA_8B, "--seq_len", "1M", "--sp_size", "3"], "does not divide the world size 8; allowed: 1, 2"),
    "memory that is no number": (
        ["--seq_len", "1M", "--device_memory_gib", "nan"],
        "device_memory_gib is nan; allowed",
    ),
    "infinite memory": (["--seq_len", "1M", "--device_memory_gib", "inf"], "device_memory_gib is inf; allowed"),
    "negative host": ([*LLAMA_8B, "--seq_len", "1M", "--host_memory_gib", "-1"], "host_memory_gib is -1.0; allowed"),
    "host that is no number": ([*LLAMA_8B, "--seq_len", "1M", "--host_memory_gib", "nan"], "host_memory_gib is nan"),
    "gpu without a name": (["--seq_len", "1M", "--gpu", ""], "gpu is ''"),
    "dry run of a table": ([*LLAMA_8B, "--table", "--trace"], "trace shows one plan, and table makes none"),
    "table of a length": ([*LLAMA_8B, "--table", "--seq_len", "4K"], "not allowed with argument"),
    "no adapters": ([*LLAMA_8B, "--seq_len", "4K", "--peft_config", "/none"], "peft_config is '/none'; allowed"),
    "no model": (["--model", "/none/x", "--gpu", "H100", "--seq_len", "4K"], "model '/none/x' was not found"),
    "unknown flag": ([*LLAMA_8B, "--seq_len", "1M", "--seqlen", "3"], "unrecognized arguments: --seqlen 3"),
    "unknown picture": (
        [*LLAMA_8B, "--seq_len", "4K", "--plot", "/tmp/plan.doc"],
        "allowed: a file with one of the suffixes",
    ),
    "picture of no format": ([*LLAMA_8B, "--seq_len", "4K", "--plot", "/tmp/plan"], "plot is '/tmp/plan'; allowed"),
    "nowhere to write": ([*LLAMA_8B, "--seq_len", "4K", "--plot", "/none/x.png"], "plot '/none/x.png' cannot be"),
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_planned_is_refused_in_one_line(capsys, monkeypatch, flags, message):
    monkeypatch.chdir(ROOT)
    assert message in refuse(capsys, *flags)


LLAMA = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4}
REFUSED_MODELS = {
    "heads that do not divide": (LLAMA | {"num_attention_heads": 3}, "The hidden size (256) is not a multiple of the"),
    "no heads": (LLAMA | {"num_attention_heads": 0}, "cannot be read: integer division or modulo by zero"),
    "size that is no number": (LLAMA | {"hidden_size": "abc"}, "Field 'hidden_size' expected int, got str"),
    "no layers": (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers in the config of model type 'llama' is 0"),
    "unknown type": ({"model_type": "nope"}, "model type `nope`"),
    "encoder": ({"model_type": "bert"}, "model type 'bert' is not a decoder"),
    "encoder and decoder": ({"model_type": "t5"}, "model type 't5' is not a decoder"),
    "speech": ({"model_type": "whisper"}, "model type 'whisper' is not a decoder"),
    "too many experts": (
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 8},
        "num_experts_per_tok in the config of model type 'mixtral' is 8; allowed: 1 to its number of experts, 4",
    ),
}


@pytest.mark.parametrize(("config", "message"), REFUSED_MODELS.values(), ids=REFUSED_MODELS)
def test_a_model_that_cannot_be_planned_is_refused_in_one_line(tmp_path, capsys, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert message in refuse(capsys, "--model", str(tmp_path), "--gpu", "H100", "--seq_len", "4K")


def test_a_refusal_is_the_command_s_exit_code_and_its_only_line():
    done = run(*LLAMA_8B, "--seq_len", "0")
    error, imported = done.stderr.splitlines()
    assert (done.returncode, done.stdout, imported) == (2, "", "[]")
    assert error == "mst-plan: error: seq_len is 0; allowed: a whole number >= 1"
