"""Tries the optimizer and the schedule of a DeepSpeed JSON on one number, where they need no build."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import deepspeed.ops.adagrad
import deepspeed.ops.adam
import deepspeed.ops.lamb
import deepspeed.ops.lion
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from mst_ds.config import nearest
from mst_ds.zero import DsConfig

_OF_MUP = ("muadam", "muadamw", "musgd")
# DeepSpeed takes these out of the parameters before it calls the class, and adds the last itself.
_OF_ADAM = ("adam_w_mode", "fp32_optimizer_states", "torch_adam")
_OF_MUON = ("lr", "momentum", "weight_decay", "ns_method", "betas", "eps", "muon_lr", "adam_lr")


def check_optimizer(ds_config: DsConfig, *, zero_stage: int, is_offloaded: bool) -> None:
    """Look at the JSON's optimizer, if it has one.

    Raises:
        ValueError: neither DeepSpeed nor torch has it, it lacks what it needs here, it does not take a parameter, or
            ZeRO computes it in another way than it is planned and logged.
    """
    if "optimizer" not in ds_config:
        return
    name, params = ds_config["optimizer"]["type"], dict(ds_config["optimizer"].get("params") or {})
    kind = name.lower()
    if "max_grad_norm" in params:
        raise ValueError("optimizer.params.max_grad_norm stands in the JSON; allowed: gradient_clipping beside it")
    if kind == "muon" and zero_stage > 0:
        # ZeRO has Muon's update in the place of the gradient before it takes the norm and clips by it
        # (`get_flat_partition`, `_apply_muon_to_accumulated_grads`), and gathers gradients and momenta whole.
        raise ValueError(
            f"optimizer.type is {name!r} at ZeRO stage {zero_stage}, where DeepSpeed clips Muon's updates in place of "
            "the gradients and gathers both whole in a step, which no plan counts; allowed: AdamW"
        )
    if kind in DEEPSPEED_OPTIMIZERS and not (params.get("torch_adam") or (kind == "adagrad" and not is_offloaded)):
        _check_deepspeeds(name, kind, params, is_offloaded)
        return
    for key in _OF_ADAM:
        params.pop(key, None)
    if kind in DEEPSPEED_OPTIMIZERS:
        found: Any = {"adagrad": torch.optim.Adagrad, "adam": torch.optim.AdamW}.get(kind, torch.optim.AdamW)
    else:
        found = getattr(torch.optim, name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)) or found is torch.optim.Optimizer:
        names = [*DEEPSPEED_OPTIMIZERS, *_classes(torch.optim, torch.optim.Optimizer)]
        raise ValueError(
            f"optimizer.type is {name!r}{nearest(name, names)}; allowed: an optimizer of DeepSpeed "
            f"({', '.join(DEEPSPEED_OPTIMIZERS)}) or torch"
        )
    _require_parameters("optimizer", name, found, params)
    _try("optimizer", name, lambda: found([_number()], **params))
    is_tested = zero_stage == 0 or found in ZERO_SUPPORTED_OPTIMIZERS
    if not is_tested and not ds_config.get("zero_allow_untested_optimizer"):
        raise ValueError(
            f"optimizer.type is {name!r}, which DeepSpeed has not tested with ZeRO; allowed: AdamW, or "
            "'zero_allow_untested_optimizer': true beside it"
        )


def check_scheduler(ds_config: DsConfig, *, zero_stage: int) -> None:
    """Look at the JSON's schedule, if it has one.

    Raises:
        ValueError: neither DeepSpeed nor torch has it, it needs more than the step, it does not take a parameter, or it
            is torch's and ZeRO's optimizer is not.
    """
    if "scheduler" not in ds_config:
        return
    name, params = ds_config["scheduler"]["type"], ds_config["scheduler"].get("params")
    found = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name, None)
    base = torch.optim.lr_scheduler.LRScheduler
    if not isinstance(found, type) or found is base or not (issubclass(found, base) or hasattr(found, "get_lr")):
        names = [*lr_schedules.VALID_LR_SCHEDULES, *_classes(torch.optim.lr_scheduler, base)]
        raise ValueError(
            f"scheduler.type is {name!r}{nearest(name, names)}; allowed: a schedule of DeepSpeed "
            f"({', '.join(lr_schedules.VALID_LR_SCHEDULES)}) or torch"
        )
    if params is None:
        raise ValueError(f"scheduler.params is missing; allowed: an object with what {name} takes, {{}} for nothing")
    schedule: Callable[..., Any] = found
    if issubclass(found, base) and zero_stage > 0:
        raise ValueError(
            f"scheduler.type is {name!r} of torch, which does not take the optimizer of ZeRO stage {zero_stage}; "
            f"allowed: a schedule of DeepSpeed ({', '.join(lr_schedules.VALID_LR_SCHEDULES)}), or --lr_scheduler_type "
            "without a scheduler in the JSON"
        )
    _require_parameters("scheduler", name, schedule, params)
    _try("scheduler", name, lambda: schedule(torch.optim.AdamW([_number()], lr=1e-3), **params))


def _check_deepspeeds(name: str, kind: str, params: Mapping[str, Any], is_offloaded: bool) -> None:
    """An optimizer whose class compiles what it needs: only its signature can be looked at."""
    if kind in _OF_MUP:
        if find_spec("mup") is None:
            raise ValueError(
                f"optimizer.type is {name!r}, which needs the package mup: install it with pip install mup"
            )
        return
    if kind == "muon":
        _require_names("optimizer", name, params, [*_OF_MUON, *_OF_ADAM])
        return
    ops = deepspeed.ops
    builder, found = {
        "adagrad": ("CPUAdagradBuilder", ops.adagrad.DeepSpeedCPUAdagrad),
        "lamb": ("FusedLambBuilder", ops.lamb.FusedLamb),
        "lion": ("CPULionBuilder", ops.lion.DeepSpeedCPULion)
        if is_offloaded
        else ("FusedLionBuilder", ops.lion.FusedLion),
    }.get(
        kind,
        ("CPUAdamBuilder", ops.adam.DeepSpeedCPUAdam) if is_offloaded else ("FusedAdamBuilder", ops.adam.FusedAdam),
    )
    implementation = get_accelerator().create_op_builder(builder)
    if implementation is None or type(implementation).__name__ == "NotImplementedBuilder":
        raise ValueError(f"optimizer.type is {name!r}, which DeepSpeed does not have for this device; allowed: AdamW")
    extra = _OF_ADAM if kind in ("adam", "adamw") else ()
    _require_names("optimizer", name, params, [*list(inspect.signature(found).parameters)[1:], *extra])


def _require_parameters(block: str, name: str, found: Callable[..., Any], params: Mapping[str, Any]) -> None:
    of_class = inspect.signature(found).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in of_class):
        _require_names(block, name, params, [parameter.name for parameter in list(of_class)[1:]])


def _require_names(block: str, name: str, params: Mapping[str, Any], known: Iterable[str]) -> None:
    names = list(dict.fromkeys(known))
    for key in params:
        if key not in names:
            raise ValueError(
                f"{block}.params.{key} is unknown to {name}{nearest(key, names)}; allowed: {', '.join(names)}"
            )


def _try(block: str, name: str, construct: Callable[[], Any]) -> None:
    """Constructs it and takes a step: what a library raises for parameters that it does not like may be anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said again in the run, where it is true
            construct().step()
    except Exception as error:
        raise ValueError(f"{block}.type {name!r} cannot be used with these params: {error}") from None


def _number() -> torch.nn.Parameter:
    number = torch.nn.Parameter(torch.zeros(1))
    number.grad = torch.zeros(1)
    return number


def _classes(module: Any, base: type) -> list[str]:
    return [name for name, found in vars(module).items() if isinstance(found, type) and issubclass(found, base)]
