"""Flags, the YAML file, and the "mst" block."""

import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

import pytest

from mst_ds.config import LossOn, NonFinite, Packing, TooLong, TrainConfig, parse_seq_len
from mst_ds.config_parser import parse_train_config
from mst_ds.objective_flags import ObjectiveName


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("4096", 4096), ("128K", 131072), ("128k", 131072), ("1M", 1048576), ("0", 0), ("-5", -5)],
)
def test_seq_len_is_read_in_tokens(text, tokens):
    assert parse_seq_len(text) == tokens


@pytest.mark.parametrize("text", ["", "long", "1.5M", "4 K tokens", "1G"])
def test_seq_len_that_is_no_length_is_refused(text):
    with pytest.raises(ValueError, match="allowed: a whole number of tokens such as 4096, 128K or 1M"):
        parse_seq_len(text)


def test_the_home_folder_of_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("tokenizer: ~/words", encoding="utf-8")
    flags = ["--config=~/run.yaml", "--model=~/m", "--peft_config=~/a", "--ds_config=~/d.json"]
    config = parse_train_config(flags)
    found = [config.model, config.peft_config, config.ds_config, config.tokenizer]
    assert found == [str(tmp_path / name) for name in ("m", "a", "d.json", "words")]


def test_every_flag_has_help_and_reaches_the_config():
    texts = {int: "7", int | None: "7", float: "0.5", float | None: "0.5", bool: "False"}
    texts |= {Packing: "none", NonFinite: "skip", LossOn: "last_assistant", TooLong | None: "drop"}
    texts |= {ObjectiveName: "simpo", float: "0.25"}
    changed = {
        name: texts.get(of_type, "linear")
        for name, of_type in get_type_hints(TrainConfig).items()
        # Of those that say how long a run is, and of those that say which adapters are trained, only one may be given;
        # and those of one objective. Added tokens are lists.
        if name not in ("config", "output_dir", "resume", "max_steps", "peft_config", "adapter")
        and not re.search("desirable|^loss_type|^epsilon|text_column|^add_", name)
    }
    changed |= {"hang_timeout": "1.5", "report_to": "none", "push_to_hub": "True", "optim": "adamw_8bit"}
    config = parse_train_config([text for name, value in changed.items() for text in (f"--{name}", value)])
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"]
        if field.name in changed:
            assert str(getattr(config, field.name)) == changed[field.name]


def test_without_flags_all_is_as_the_class_has_it():
    assert parse_train_config([]) == TrainConfig()


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seq_len: 128K\nlearning_rate: 1e-4\nmax_steps: 30\ntokenizer:\n")
    config = parse_train_config(["--max_steps", "40", "--config", str(path), "--seed=1"])
    assert (config.seq_len, config.learning_rate, config.max_steps, config.seed) == (131072, 1e-4, 40, 1)
    assert config.tokenizer is None
    assert config.weight_decay == TrainConfig().weight_decay


def test_datasets_are_one_or_several(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("dataset: [a.jsonl:0.7, b:0.3]\nseed: 1\n")
    config = parse_train_config(["--config", str(path)])
    assert (config.dataset, config.dataset_name) == (["a.jsonl:0.7", "b:0.3"], "a.jsonl:0.7 b:0.3")
    assert "dataset" in config.given
    changed = config.changed(seed=2)
    assert (changed.seed, changed.dataset, changed.given) == (2, config.dataset, config.given)
    assert parse_train_config(["--config", str(path), "--dataset", "c"]).dataset == "c"
    assert parse_train_config(["--dataset", "c", "d", "--seed", "3"]).dataset == ["c", "d"]


@pytest.mark.parametrize(
    ("content", "packing"), [("", "documents"), ("packing:", "documents"), ("packing: none", "none")]
)
def test_packing_in_the_file(tmp_path, content, packing):
    # YAML's own word for no value is null: none is text.
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert parse_train_config(["--config", str(path)]).packing == packing
    assert parse_train_config(["--config", str(path), "--packing", "documents"]).packing == "documents"


def test_a_pretrained_model_gets_a_gentle_learning_rate_by_default():
    assert TrainConfig().peak_learning_rate == 4e-3
    assert TrainConfig(model="meta-llama/Llama-3.1-8B").peak_learning_rate == 2e-5
    assert TrainConfig(model="meta-llama/Llama-3.1-8B", learning_rate=1e-4).peak_learning_rate == 1e-4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'; nearest: 'learning_rate'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("packing: false", "argument --packing: invalid choice: 'False'"),
        ("seed: [1, 2]", "seed in .* is a list; allowed: one number or text"),
        ("- seed", "holds a list; allowed: a mapping from flag to value"),
        ("seed: {", "is not YAML"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        parse_train_config(["--config", str(path)])
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="allowed: an existing YAML file"):
        parse_train_config(["--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--seq_len", "long"],
            "argument --seq_len/--seq-len: seq_len is 'long'; allowed: a whole number of tokens",
        ),
        (["--max_steps", "1.5"], "invalid int value: '1.5'"),
        (["--packing", "nonsense"], "argument --packing: invalid choice: 'nonsense' (choose from "),
        (["--learning", "1"], "--learning"),
    ],
)
def test_argparse_names_the_flag(capsys, flags, message):
    with pytest.raises((SystemExit, ValueError)) as stop:
        parse_train_config(flags)
    assert message in capsys.readouterr().err + str(stop.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seq_len": 0}, "seq_len is 0; allowed: a whole number >= 1"),
        ({"seq_len": -4096}, "seq_len is -4096"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"learning_rate": 0.0}, r"learning_rate is 0.0; allowed: a number > 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"adam_beta1": 1.0}, "adam_beta1 is 1.0"),
        ({"adam_beta2": 1.0}, "adam_beta2 is 1.0"),
        ({"adam_epsilon": 0.0}, "adam_epsilon is 0.0; allowed: a number > 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0; allowed: a number >= 0"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm is inf; allowed: a number >= 0 and at most"),
        ({"save_minutes": float("inf")}, "save_minutes is inf; allowed: a number >= 0 and at most 527040, a year"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type is 'reduce_lr_on_plateau'"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"max_steps": 5, "warmup_steps": 6}, r"warmup_steps is 6; allowed: 0 to max_steps \(5\)"),
        ({"num_train_epochs": 0.0}, "num_train_epochs is 0.0; allowed: a number > 0"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs is nan"),
        ({"num_train_epochs": 1.0, "warmup_steps": -1}, "warmup_steps is -1; allowed: 0 to the steps of the run"),
        ({"packing": "nonsense"}, "packing is 'nonsense'; allowed: documents or none"),
        ({"loss_on": "user"}, "loss_on is 'user'; allowed: assistant or last_assistant or all"),
        ({"too_long": "cut"}, "too_long is 'cut'; allowed: split or truncate or drop"),
        ({"non_finite": "ignore"}, "non_finite is 'ignore'; allowed: stop or skip"),
        ({"save_steps": -1}, "save_steps is -1"),
        ({"save_minutes": -1.0}, "save_minutes is -1.0"),
        ({"save_total_limit": 0}, "save_total_limit is 0; allowed: a whole number >= 1"),
        ({"hang_timeout": 0.0}, "hang_timeout is 0.0; allowed: seconds, 1 to"),
        ({"resume": "auto"}, "resume is 'auto', but no output_dir says where to look; allowed: give --output_dir too"),
        ({"resume": "/none/here"}, "resume is '/none/here'; allowed: 'auto', or the folder of a checkpoint"),
        ({"eval_steps": -1}, "eval_steps is -1"),
        (
            {"eval_steps": 1, "eval_samples": 0},
            "eval_samples is 0; allowed: at least 1 where eval_steps is not 0",
        ),
        (
            {"lr_scheduler_type": "cosin"},
            "lr_scheduler_type is 'cosin'; allowed: .*linear.*; nearest: 'cosine'",
        ),
    ],
)
def test_validate_refuses(values, message):
    with pytest.raises(ValueError, match=message) as error:
        TrainConfig(**values).validate()
    assert "\n" not in str(error.value)


def test_warm_up_is_a_tenth_of_the_run_unless_given():
    assert TrainConfig(max_steps=50).num_warmup_steps == 5
    assert TrainConfig(max_steps=50, warmup_steps=0).num_warmup_steps == 0


def test_validate_accepts_the_limits(tmp_path):
    TrainConfig(seq_len=1, max_steps=1, warmup_steps=1, eval_steps=0, eval_samples=0).validate()
    TrainConfig(output_dir=str(tmp_path / "new" / "run")).validate()
    assert not (tmp_path / "new").exists()


def test_output_dir_has_to_be_a_folder(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "run"):
        with pytest.raises(ValueError, match="is a file; allowed: a folder"):
            TrainConfig(output_dir=str(folder)).validate()


def test_output_dir_has_to_be_writable(tmp_path, monkeypatch):
    # Root may write everywhere, so the answer of the system is replaced.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} is not writable"):
        TrainConfig(output_dir=str(tmp_path / "run")).validate()


def test_parsing_validates():
    with pytest.raises(ValueError, match="seq_len is -1"):
        parse_train_config(["--seq_len", "-1"])


def test_every_schedule_that_is_allowed_works():
    import torch
    from transformers import get_scheduler

    with pytest.raises(ValueError, match="lr_scheduler_type is 'none'; allowed: ") as refusal:
        parse_train_config(["--lr_scheduler_type", "none"])
    names = re.split(", |; ", str(refusal.value).rpartition("allowed: ")[2])[:-1]  # the last is what is nearest
    assert {"linear", "cosine", "constant"} < set(names)
    for name in names:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        schedule = get_scheduler(name, optimizer, 1, 4)
        optimizer.step()
        schedule.step()
