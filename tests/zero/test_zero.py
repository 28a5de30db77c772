"""The DeepSpeed JSON: reading, the "mst" block, "auto", and the typed view."""

import copy
import json
import math

import pytest
from processes import ROOT

from mst_ds.config import TrainConfig
from mst_ds.settings import MstConfig
from mst_ds.zero import has_block, kept_blocks, load_ds_config, read_zero, resolve, split_mst

DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


def resolved(ds_config, **overrides):
    arguments = {
        "train": TrainConfig(),
        "hidden_size": 128,
        "has_accelerator": True,
        "dp_size": 1,
    } | overrides
    return resolve(ds_config, **arguments)


def all_values(block):
    for value in block.values():
        yield from all_values(value) if isinstance(value, dict) else [value]


def test_there_are_configs():
    assert [path.stem for path in DS_CONFIGS] == ["zero2_mst", "zero3_mst", "zero3_mst_offload"]


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("has_accelerator", [True, False])
def test_shipped_configs_resolve_to_what_deepspeed_accepts(path, has_accelerator):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    ds_config, mst = split_mst(resolved(load_ds_config(path), has_accelerator=has_accelerator))
    assert mst == MstConfig()
    assert "auto" not in all_values(ds_config)
    theirs = DeepSpeedZeroConfig(**ds_config["zero_optimization"])
    ours = read_zero(ds_config, dp_world_size=2)
    assert (
        (ours.stage, ours.reduce_bucket_size)
        == (theirs.stage, theirs.reduce_bucket_size)
        == (int(path.stem[4]), 128**2)
    )
    assert ours.dtype == ("bf16" if has_accelerator else "fp32")
    is_offloaded = "offload" in path.stem
    assert ours.param_offload == ours.optimizer_offload == ("cpu" if is_offloaded else "none")
    # DeepSpeed's own CPU Adam needs a build; a machine without an accelerator does without it.
    assert ds_config.get("zero_force_ds_cpu_optimizer") == (has_accelerator if is_offloaded else None)


def test_defaults_are_deepspeeds():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    for stage in range(4):
        ours = read_zero({"zero_optimization": {"stage": stage}}, dp_world_size=4)
        theirs = DeepSpeedZeroConfig(stage=stage)
        assert ours.overlap_comm == theirs.overlap_comm
        assert ours.reduce_bucket_size == theirs.reduce_bucket_size
        assert ours.allgather_bucket_size == theirs.allgather_bucket_size
        assert ours.sub_group_size == theirs.sub_group_size
        assert ours.stage3_prefetch_bucket_size == theirs.prefetch_bucket_size
        assert ours.stage3_max_live_parameters == theirs.max_live_parameters
        assert ours.stage3_max_reuse_distance == theirs.max_reuse_distance
        assert ours.stage3_param_persistence_threshold == theirs.param_persistence_threshold
        assert ours.stage3_model_persistence_threshold == theirs.model_persistence_threshold
    ours, theirs = read_zero({}, dp_world_size=4), DeepSpeedZeroConfig()
    assert ours.stage == theirs.stage
    param, optimizer = DeepSpeedZeroOffloadParamConfig(), DeepSpeedZeroOffloadOptimizerConfig()
    assert (ours.pins_parameters, ours.param_max_in_cpu) == (param.pin_memory, param.max_in_cpu)
    assert ours.pins_optimizer == optimizer.pin_memory


def test_a_mapping_is_copied():
    given = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}, "mst": {"sp_size": 2}}
    before = copy.deepcopy(given)
    loaded = load_ds_config(given)
    resolved(loaded)["zero_optimization"]["stage"] = 1
    rest, mst = split_mst(loaded)
    rest["zero_optimization"]["stage"] = 0
    assert loaded == given == before
    assert "mst" not in rest
    assert mst.get("sp_size") == 2


@pytest.mark.parametrize(
    ("ds_config", "message"),
    [
        *(({"zero_optimization": {"stage": s}}, "allowed: 0, 1, 2, 3") for s in (4, -1, "3", True, 2.0, "auto")),
        ({"zero_optimization": True}, "zero_optimization is True; allowed: an object"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        (
            {"train_micro_batch_size_per_gpu": 0},
            "train_micro_batch_size_per_gpu is 0; allowed: 'auto' or a whole",
        ),
        (
            {"zero_optimization": {"zero_hpz_partition_size": 8}},
            "zero_hpz_partition_size is 8; allowed: 1, or leave it",
        ),
        *(
            ({"zero_optimization": {key: True}}, f"{key} is True; allowed: false, or leave it out")
            for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
        ),
        ({"zero_optimization": {"mics_shard_size": 8}}, "mics_shard_size is 8; allowed: -1, or leave it out"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled is True; allowed: false, or leave it out"),
        ({"amp": {"enabled": True}}, "amp.enabled is True; allowed: false, or leave it out"),
        ({"data_types": {"keep_in_fp32_modules": None}}, 'data_types.keep_in_fp32_modules is None; allowed: "auto"'),
        ({"data_types": {"buffer_dtype": "bf16"}}, "data_types.buffer_dtype is 'bf16'; allowed: null"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps is 1.5"),
        ({"train_batch_size": "8"}, "train_batch_size is '8'"),
        ({"train_micro_batch_size_per_gpu": 10**9}, "is 1000000000; allowed: 'auto' or a whole number from 1 to"),
        ({"zero_optimization": {"reduce_bucket_size": math.inf}}, "reduce_bucket_size is inf; allowed: a finite"),
        ({"tensorboard": {"x": [1, {"y": math.nan}]}}, r"tensorboard.x\[1\].y is nan; allowed: a finite number"),
        ({"steps_per_print": 10**4400}, "steps_per_print is a number of 14617 bits; allowed: at most 63"),
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, "unknown key 'overlap_com'; nearest: 'overlap_co"),
        ({"zero_optimization": {"overlap_comm": "yes"}}, "overlap_comm is 'yes'; allowed: true or false"),
        ({"zero_optimization": {"max_live_parameters": 1}}, "allowed: 'stage3_max_live_parameters', as"),
        *(({"gradient_clipping": x}, f"gradient_clipping is {x!r}; allowed: 'auto' or") for x in (-1, "x", None, True)),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled is 'yes'; allowed: 'auto', true or false"),
        ({"bfloat16": {"enabled": True}}, "the key 'bfloat16'; allowed: 'bf16'"),
        ({"optimizer": "AdamW"}, "optimizer is 'AdamW'; allowed: an object"),
        ({"optimizer": {"params": {}}}, "optimizer.type is None; allowed: the name of an optimizer, such as 'AdamW'"),
        ({"scheduler": {"params": {}}}, "scheduler.type is None; allowed: the name of a scheduler"),
        *(
            ({"optimizer": {"type": "AdamW", "params": {key: value}}}, f"optimizer.params.{key} is")
            for key, value in (
                *(("lr", -1e-4), ("lr", 0), ("lr", "x"), ("lr", 1e4), ("lr", [1e-3, -1])),
                *(("eps", -1), ("weight_decay", True), ("momentum", -1)),
            )
        ),
        *(
            ({"scheduler": {"type": "WarmupLR", "params": {key: value}}}, f"scheduler.params.{key} is")
            for key, value in (("warmup_min_lr", -1), ("warmup_max_lr", 0), ("total_num_steps", -1))
        ),
        *(
            ({"optimizer": {"type": "Adam", "params": {"betas": x}}}, "betas is .* two numbers")
            for x in ([0.9], [0, 1])
        ),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1.5}}}, "num_steps is 1.5; allowed: 'auto'"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "lin"}}},
            "warmup_type is 'lin'; allowed: 'log' or",
        ),
        ({"sequence_parallel": {"size": 4}}, "sequence_parallel stands in the JSON; allowed: sp_size"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size is 2; allowed: 0"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "allowed: recompute and offload_activations in"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is 'sum'; allowed: \"mean\", or leave it out"),
        *(
            ({name: {key: True}}, f"{name}.{key} is True; allowed: false, or leave it out")
            for name, key in (
                ("expert_parallel", "enabled"),
                ("hybrid_engine", "enabled"),
                ("data_efficiency", "enabled"),
                ("compile", "deepcompile"),
                ("autotuning", "enabled"),
            )
        ),
        *(
            ({"activation_checkpointing": {key: True}}, f"activation_checkpointing.{key} is set, but")
            for key in ("partition_activations", "contiguous_memory_optimization")
        ),
        ({"weight_quantization": {}}, "weight_quantization stands in the JSON, which training here has no use for"),
        *(({"gradient_predivide_factor": x}, "gradient_predivide_factor is") for x in (0, -1.0, "x", True, 1e31)),
        ({3: 4}, "the DeepSpeed JSON has the key 3; allowed: text"),
        ({"pipeline": {"stages": 2}}, "pipeline stands in the JSON, which training here has no use for"),
        ({"mst": {"spsize": 2}}, "'mst' has the unknown key 'spsize'; nearest: 'sp_size'"),
    ],
)
def test_bad_values_are_refused_on_loading(ds_config, message):
    with pytest.raises(ValueError, match=message) as error:
        load_ds_config(ds_config)
    assert "\n" not in str(error.value)


def test_keys_that_only_deepspeed_knows_pass():
    ds_config = {"wall_clock_breakdown": True, "tensorboard": {"enabled": False}, "amp": {"enabled": False}}
    assert resolved(load_ds_config(ds_config)).items() >= ds_config.items()


def test_train_batch_size_counts_samples_over_sequence_groups():
    ds_config = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
    }
    assert "train_batch_size" not in resolved(ds_config, dp_size=4)
    assert "train_batch_size" not in resolved(ds_config | {"train_batch_size": "auto"}, dp_size=2)
    with pytest.raises(ValueError, match=r"train_batch_size is 24; allowed: 12 = .* 2 x .* 3 x 2 data-parallel"):
        resolved(ds_config, dp_size=2)


def test_auto_follows_the_hugging_face_trainer(tmp_path):
    """The oracle is transformers' own code, fed the same values."""
    from types import SimpleNamespace

    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    ds_config = {
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        "optimizer": {
            "type": "AdamW",
            "params": dict.fromkeys(["lr", "betas", "eps", "weight_decay"], "auto"),
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": dict.fromkeys(["warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"], "auto"),
        },
    }
    train = TrainConfig(warmup_steps=0, learning_rate=3e-4, weight_decay=0.2, adam_beta2=0.99, max_grad_norm=0.7)
    arguments = SimpleNamespace(
        world_size=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_grad_norm=0.7,
        learning_rate=3e-4,
        adam_beta1=train.adam_beta1,
        adam_beta2=0.99,
        adam_epsilon=train.adam_epsilon,
        weight_decay=0.2,
        save_on_each_node=False,
        fp16=False,
        fp16_full_eval=False,
        bf16=True,
        bf16_full_eval=False,
        get_warmup_steps=lambda steps: 0,
    )
    theirs = HfTrainerDeepSpeedConfig(copy.deepcopy(ds_config))
    theirs.trainer_config_process(arguments)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=1000))
    theirs.trainer_config_finalize(arguments, model, train.max_steps)
    ours = resolved(ds_config, train=train, hidden_size=1000)
    assert ours == json.loads(json.dumps(theirs.config))


def test_bf16_auto_gives_way_to_fp16():
    ds_config = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": True}}
    assert read_zero(resolved(ds_config), dp_world_size=1).dtype == "fp16"


def test_auto_without_a_rule_is_refused_and_deepspeeds_own_stays():
    with pytest.raises(ValueError, match=r"zero_optimization.sub_group_size is 'auto', which has no meaning there"):
        resolved({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}})
    own = {"data_types": {"keep_in_fp32_modules": "auto"}}
    assert resolved(own)["data_types"] == own["data_types"]


@pytest.mark.parametrize(
    ("ds_config", "field", "expected"),
    [
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8}}, "reduce_bucket_size", 500_000_000),
        ({"zero_optimization": {"stage": 1, "cpu_offload": True}}, "optimizer_offload", "cpu"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "param_offload", "nvme"),
        # DeepSpeed offloads parameters at stage 3 only, the optimizer from stage 1 on.
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "param_offload", "none"),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "optimizer_offload",
            "none",
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": None}}, "optimizer_offload", "none"),
        ({"bf16": {"enabled": True}}, "dtype_bytes", 2),
        ({"bf16": {"enabled": True}}, "grad_accum_dtype_bytes", 2),
        (
            {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            "grad_accum_dtype_bytes",
            4,
        ),
        ({}, "dtype_bytes", 4),
        ({}, "dp_world_size", 8),
        ({}, "optimizer_moments", 2),
        *(
            ({"optimizer": {"type": name}}, "optimizer_moments", moments)
            for name, moments in {"AdamW": 2, "Lamb": 2, "Unheard": 2, "Lion": 1, "Adagrad": 1, "SGD": 0}.items()
        ),
        ({"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}, "optimizer_moments", 1),
        ({"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.0}}}, "optimizer_moments", 0),
    ],
)
def test_settings_are_typed(ds_config, field, expected):
    assert getattr(read_zero(ds_config, dp_world_size=8), field) == expected


@pytest.mark.parametrize(
    ("ds_config", "message"),
    [
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
            "reduce_bucket_size is 'auto'; allowed",
        ),
        ({"zero_optimization": {"stage": 3, "sub_group_size": -1}}, "sub_group_size is -1"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 1.5}}, "sub_group_size is 1.5; allowed: a whole number"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 1e19}}, r"sub_group_size is 1e\+19; allowed"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled is 'auto'; allowed: true or false"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}},
            "device is 'disk'; allowed: none, cpu",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": "yes"}}},
            "offload_param.pin_memory is 'yes'; allowed: true or false",
        ),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, "grad_accum_dtype is 'fp8'; allowed: fp32"),
        ({"data_types": {"grad_accum_dtype": ["fp32"]}}, r"grad_accum_dtype is \['fp32'\]; allowed: fp32"),
        ({"optimizer": {"type": 3}}, "optimizer.type is 3; allowed: the name of an optimizer"),
        (
            {"optimizer": {"type": "SGD", "params": {"momentum": "auto"}}},
            "optimizer.params.momentum is 'auto'; allowed: a number",
        ),
    ],
)
def test_settings_of_the_wrong_type_are_refused(ds_config, message):
    with pytest.raises(ValueError, match=message):
        read_zero(ds_config, dp_world_size=1)


def test_what_the_json_brings_itself():
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert read_zero(offload, dp_world_size=1).offloads_optimizer
    assert not read_zero({"zero_optimization": {"stage": 2}}, dp_world_size=1).offloads_optimizer
    assert has_block({"optimizer": {"type": "AdamW"}}, "optimizer")
    assert not has_block({"optimizer": {"type": "AdamW"}}, "scheduler")


def test_settings_that_come_from_a_checkpoint():
    own = {"optimizer": {"type": "AdamW"}, "fp16": {"enabled": True}, "gradient_clipping": 1}
    assert kept_blocks(own).keys() == {"optimizer", "fp16"}
    assert kept_blocks({"fp16": {"enabled": False}, "scheduler": {"type": "WarmupDecayLR"}}) == {}
    assert kept_blocks({"scheduler": {"type": "StepLR"}}) == {"scheduler": {"type": "StepLR"}}


def test_deepspeeds_schedules_are_known():
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

    assert not any(kept_blocks({"scheduler": {"type": name}}) for name in VALID_LR_SCHEDULES)


@pytest.mark.parametrize("key", ["sequence_parallel_size", "data_parallel_size"])
def test_deepspeeds_own_sequence_parallelism_is_refused(key):
    with pytest.raises(ValueError, match=f"{key} stands in the JSON; allowed: sp_size"):
        load_ds_config({key: 2})


def test_a_typing_error_in_a_key_does_not_train_without_zero():
    with pytest.raises(ValueError, match="unknown key 'zero_optimisation'; nearest: 'zero_optimization'"):
        load_ds_config({"zero_optimisation": {"stage": 3}})
    load_ds_config({"wall_clock_breakdown": True, "steps_per_print": 10})  # DeepSpeed's to judge


def test_offload_without_an_accelerator_takes_a_torch_optimizer():
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    for has_accelerator, expected in ((False, False), (True, None)):
        done = resolve(config, train=TrainConfig(), hidden_size=8, has_accelerator=has_accelerator, dp_size=1)
        assert done.get("zero_force_ds_cpu_optimizer") is expected
