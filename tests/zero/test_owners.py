"""A flag that was given beside a DeepSpeed JSON that says another number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mst_ds.config import TrainConfig
from mst_ds.config_parser import parse_train_config
from mst_ds.zero import resolve


def resolved(ds_config: dict[str, Any], *flags: str) -> dict[str, Any]:
    return resolve(ds_config, train=parse_train_config(flags), hidden_size=8, has_accelerator=True, dp_size=1)


def optimizer(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": params}}


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


@pytest.mark.parametrize(
    ("ds_config", "flag", "says"),
    [
        (optimizer(lr=1e-5), "--learning_rate=1e-3", "learning_rate is 0.001 by the flag, but optimizer.params.lr of"),
        (
            optimizer(weight_decay=0.1),
            "--weight-decay=0.01",
            "weight_decay is 0.01 by the flag, but .*weight_decay of.* is 0.1",
        ),
        (
            optimizer(betas=[0.9, 0.95]),
            "--adam_beta2=0.99",
            "adam_beta2 is 0.99 .* optimizer.params.betas of.* is 0.95",
        ),
        (optimizer(eps=1e-6), "--adam_epsilon=1e-8", "adam_epsilon is 1e-08 by the flag, but optimizer.params.eps"),
        (optimizer(), "--learning_rate=1e-3", "optimizer.params.lr of.* is left out, which would"),
        (
            {"gradient_clipping": 0.5},
            "--max_grad_norm=1",
            "max_grad_norm is 1.0 .* gradient_clipping of.* is 0.5",
        ),
        (scheduler("WarmupLR"), "--lr_scheduler_type=linear", "lr_scheduler_type is 'linear' .* is 'WarmupLR'"),
        (
            scheduler("WarmupLR"),
            "--warmup_steps=5",
            "warmup_steps is 5 .*warmup_num_steps of.* is left out",
        ),
        (scheduler("WarmupLR", warmup_max_lr=1e-5), "--learning_rate=1e-3", "warmup_max_lr of.* is 1"),
        (scheduler("WarmupDecayLR"), "--learning_rate=1e-3", "warmup_max_lr of.* is left out"),
        (scheduler("OneCycle", cycle_max_lr=1e-3), "--learning_rate=1e-3", "warmup_max_lr of.* is left out"),
        (
            scheduler("WarmupDecayLR", total_num_steps=9),
            "--max_steps=8",
            "max_steps is 8 .*total_num_steps of.* is 9",
        ),
    ],
)
def test_a_flag_that_would_have_no_effect_is_refused(
    ds_config: dict[str, Any], flag: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says) as error:
        resolved(ds_config, flag)
    assert "\n" not in str(error.value)
    resolved(ds_config)  # the default of the flag is nobody's wish
    name, value = flag[2:].split("=")
    file = tmp_path / "run.yaml"
    file.write_text(f"{name.replace('-', '_')}: {value}")
    with pytest.raises(ValueError, match=says):
        resolved(ds_config, "--config", str(file))


def test_the_same_number_and_auto_are_one_owner() -> None:
    flags = ["--learning_rate", "1e-3", "--adam_beta1", "0.8", "--max_grad_norm", "2", "--warmup_steps", "3"]
    flags += ["--max_steps", "9"]  # which the JSON's schedule has no number for
    same = optimizer(lr=0.001, betas=[0.8, 0.9]) | {"gradient_clipping": 2} | scheduler("WarmupLR", warmup_num_steps=3)
    assert resolved(same, *flags)["optimizer"] == same["optimizer"]
    auto = optimizer(lr="auto", betas="auto") | scheduler("WarmupLR", warmup_num_steps="auto")
    assert resolved(auto, *flags)["optimizer"]["params"] == {"lr": 0.001, "betas": [0.8, TrainConfig().adam_beta2]}


@pytest.mark.parametrize(
    ("flag", "key"),
    [
        ("per_device_train_batch_size", "train_micro_batch_size_per_gpu"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
    ],
)
def test_a_batch_size_by_a_flag(flag: str, key: str) -> None:
    for ds_config in ({}, {key: "auto"}, {key: 3}, {key: "auto", "train_batch_size": 3}):
        assert resolved(ds_config, f"--{flag}=3")[key] == 3
    assert resolved({})[key] == 1
    for ds_config, says in (
        ({key: 2}, f"{flag} is 3 by the flag, but {key} of"),
        ({"train_batch_size": 4}, "is 4; all"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            resolved(ds_config, f"--{flag}=3")
        assert "\n" not in str(error.value)


def test_a_json_without_clipping_leaves_it_to_the_flag() -> None:
    assert resolved({}, "--max_grad_norm", "3")["gradient_clipping"] == 3
    assert resolved({"gradient_clipping": 0})["gradient_clipping"] == 0


def test_given_are_the_flags_of_the_command_line_and_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"seed": 42, "tokenizer": None}))
    config = parse_train_config(["--config", str(file), "--max-steps=3", "--text_column", "seq_len"])
    assert config.given == {"config", "seed", "max_steps", "text_column"}
    assert TrainConfig().given == frozenset()
