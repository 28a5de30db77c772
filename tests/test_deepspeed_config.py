"""DeepSpeed's own classes are asked of a JSON before processes meet, and answer in one line."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator

from mst_ds.config import TrainConfig
from mst_ds.engine.deepspeed_config import require_accepted
from mst_ds.zero import load_ds_config, read_zero, resolve, split_mst

DS_CONFIGS = sorted((Path(__file__).parents[1] / "ds_configs").glob("*.json"))


def accept(source: Path | dict[str, Any]) -> None:
    resolved = resolve(load_ds_config(source), train=TrainConfig(), hidden_size=64, has_accelerator=False, dp_size=1)
    ds_config = split_mst(resolved)[0]
    require_accepted(ds_config, read_zero(ds_config, dp_world_size=1))


def zero3(**values: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **values}}


def optimizer(name: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": name, "params": params}}


def scheduler(name: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": name, "params": params}}


def test_shipped_configs_pass() -> None:
    assert DS_CONFIGS
    for path in DS_CONFIGS:
        accept(path)


@pytest.mark.parametrize(
    "ds_config",
    [
        {"wall_clock_breakdown": True, "steps_per_print": 10, "tensorboard": {"enabled": False}},
        {"steps_per_print": 1e5},
        zero3(cpu_offload_param=True, stage3_gather_fp16_weights_on_model_save=True),
        {"communication_data_type": "bf16", "bf16": {"enabled": True, "immediate_grad_update": True}} | zero3(),
        zero3(offload_param={"device": "cpu"}, stage3_gather_16bit_weights_on_model_save=True, reduce_bucket_size=5e8),
        {"activation_checkpointing": {"cpu_checkpointing": False}, "flops_profiler": {"enabled": True}},
        optimizer("AdamW", lr=1e-4, betas=[0.9, 0.95], adam_w_mode=True),
        optimizer("Adam", lr="auto", torch_adam=True),
        optimizer("Adagrad", lr=1e-4),
        optimizer("SGD", lr=1e-4, momentum=0.9),
        zero3() | optimizer("SGD", lr=1e-4) | {"zero_allow_untested_optimizer": True},
        scheduler("WarmupLR"),
        scheduler("WarmupDecayLR", total_num_steps="auto", warmup_num_steps="auto"),
        scheduler("OneCycle", cycle_min_lr=1e-5, cycle_max_lr=1e-4),
        scheduler("StepLR", step_size=3),
    ],
)
def test_what_deepspeed_knows_passes(ds_config: dict[str, Any], recwarn: pytest.WarningsRecorder) -> None:
    level = logging.getLogger("DeepSpeed").level
    accept(ds_config)
    assert logging.getLogger("DeepSpeed").level == level
    assert not [str(each.message) for each in recwarn if "lr_scheduler" in str(each.message)]


@pytest.mark.parametrize(
    ("ds_config", "says"),
    [
        ({"some_block": {"x": 1}}, "has the key 'some_block', which DeepSpeed does not know"),
        ({"wall_clock_breakdwn": True}, "'wall_clock_breakdwn', which DeepSpeed does not know; nearest: 'wall_clock_"),
        ({"bf16": {"enabled": True, "x": 1}}, "unknown key 'bf16.x'; allowed: bf16_master"),
        ({"fp16": {"enabled": False, "loss_scale": "x"}}, "DeepSpeed refuses fp16.loss_scale of its JSON: fp16.loss"),
        ({"tensorboard": {"enable": True}}, "unknown key 'tensorboard.enable'; nearest: 'enabled'; allowed: enabled,"),
        (zero3(zzz=1), "unknown key 'zero_optimization.zzz'; allowed: allgather_bucket_size,"),
        (zero3(reduce_bucket_size=0), "zero_optimization.reduce_bucket_size of the DeepSpeed JSON is 0; allowed: gre"),
        (zero3(contiguous_gradients="maybe"), "contiguous_gradients of the DeepSpeed JSON is 'maybe'; allowed: a vali"),
        (
            zero3(offload_param={"device": "cpu", "pin_memori": True}),
            "'zero_optimization.offload_param.pin_memori'; nearest: 'pin_memory'; allowed: buffer_count,",
        ),
        (zero3(offload_optimizer={"device": "nvme"}), "offload_optimizer.device is 'nvme' without nvme_path; allowed"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
            "device is 'nvme' at ZeRO stage 2; allowed: 'cpu', or stage 3",
        ),
        ({"communication_data_type": "fp99"}, "DeepSpeed refuses communication_data_type ('fp99') of its JSON"),
        ({"communication_data_type": 3}, "communication_data_type of the DeepSpeed JSON is 3; allowed: str"),
        ({"vocabulary_size": "x"}, "vocabulary_size of the DeepSpeed JSON is 'x'; allowed: int"),
        ({"checkpoint": {"tag_validation": 3}}, "checkpoint.tag_validation of the DeepSpeed JSON is 3; allowed: str"),
        ({"checkpoint": {"load_univ": True}}, "'checkpoint.load_univ', which DeepSpeed does not know; nearest: 'load"),
        ({"aio": {"queue_depth": "x"}}, "aio.queue_depth of the DeepSpeed JSON is 'x'; allowed: int"),
        ({"flops_profiler": 3}, "flops_profiler (3) of the DeepSpeed JSON is not what DeepSpeed takes; allowed"),
        ({"prescale_gradients": 1}, "prescale_gradients of the DeepSpeed JSON is 1; allowed: bool"),
        ({"amp": {"enabled": False}}, "DeepSpeed refuses amp ({'enabled': False}) of its JSON"),
        (optimizer("Adamm"), "optimizer.type is 'Adamm'; nearest: 'Adam'; allowed: an optimizer of DeepSpeed"),
        (optimizer("lr_scheduler"), "optimizer.type is 'lr_scheduler'"),
        (optimizer("Optimizer"), "optimizer.type is 'Optimizer'"),
        (optimizer("Lamb"), "optimizer.type is 'Lamb', which DeepSpeed does not have for this device; allowed: AdamW"),
        (optimizer("Muon", zzz=1), "optimizer.params.zzz is unknown to Muon; allowed: lr, momentum"),
        (zero3() | optimizer("Muon", lr=1e-3), "'Muon' at ZeRO stage 3, where DeepSpeed clips Muon's updates in place"),
        (optimizer("AdamW", learning_rate=1), "optimizer.params.learning_rate is unknown to AdamW; allowed: lr, "),
        (optimizer("AdamW", max_grad_norm=1), "max_grad_norm stands in the JSON; allowed: gradient_clipping beside"),
        (optimizer("MuAdam"), "optimizer.type is 'MuAdam', which needs the package mup"),
        (optimizer("LBFGS"), "optimizer.type 'LBFGS' cannot be used with these params: LBFGS.step() missing"),
        (optimizer("SGD", nesterov=True), "optimizer.type 'SGD' cannot be used with these params: Nesterov"),
        (zero3() | optimizer("SGD", lr=1e-4), "has not tested with ZeRO; allowed: AdamW, or 'zero_allow_untested"),
        ({"optimizer": {"type": "AdamW", "parms": {}}}, "'optimizer.parms', which DeepSpeed does not know; nearest: "),
        (scheduler("Warmup"), "scheduler.type is 'Warmup'; nearest: 'WarmupLR'; allowed: a schedule of DeepSpeed"),
        (scheduler("LRScheduler"), "scheduler.type is 'LRScheduler'"),
        (scheduler("Tensor"), "scheduler.type is 'Tensor'; allowed: a schedule of DeepSpeed"),
        (scheduler("WarmupLR", warmup_steps=3), "warmup_steps is unknown to WarmupLR; nearest: 'warmup_num_steps'"),
        (scheduler("WarmupDecayLR"), "'WarmupDecayLR' cannot be used with these params: WarmupDecayLR.__init__() mis"),
        (scheduler("ReduceLROnPlateau"), "ReduceLROnPlateau.step() missing 1 required"),
        (
            zero3() | scheduler("StepLR", step_size=3),
            "'StepLR' of torch, which does not take the optimizer of ZeRO stage 3",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.params is missing; allowed: an object with what WarmupLR"),
    ],
)
def test_what_it_does_not_take_is_one_line(ds_config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        accept(ds_config)
    assert "\n" not in str(error.value)


def test_a_dtype_that_the_device_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_accelerator()), "is_bf16_supported", lambda self: False)
    with pytest.raises(ValueError, match="the DeepSpeed JSON asks for bf16, which this device does not compute in"):
        accept(zero3() | {"bf16": {"enabled": True}})


def test_nvme_needs_libaio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder

    ds_config = zero3(offload_param={"device": "nvme", "nvme_path": str(tmp_path / "new")})
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    with pytest.raises(ValueError, match=r"needs libaio, .* allowed: 'cpu', or the system's package libaio-dev"):
        accept(ds_config)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    accept(ds_config)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=r"offload_param.nvme_path is '.*file'; allowed: a folder you can write"):
        accept(zero3(offload_param={"device": "nvme", "nvme_path": str(file)}))
