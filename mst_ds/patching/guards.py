"""What outside code may change on a model that has a plan: kept as the plan says, or refused."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import nn

from mst_ds.patching.patched import PatchedModel
from mst_ds.patching.undo import Undo
from mst_ds.settings import Settings
from mst_ds.structure import MlpStructure
from mst_ds.structure.probe import is_changed_by_user

CHANGED = (
    "{} was changed after mst_ds.apply_plan, such as by {}: call mst_ds.remove_plan(model), "
    "then mst_ds.apply_plan again"
)

# Of transformers' models; a version has the one pair, the other, or both.
_SWITCHES_OF_RECOMPUTE = (
    "gradient_checkpointing_enable",
    "gradient_checkpointing_disable",
    "activation_checkpointing_enable",
    "activation_checkpointing_disable",
)


def check_unchanged(patched: PatchedModel) -> None:
    """Refuse a model that would compute something else than its plan, or than itself.

    Raises:
        ValueError: a part of it was changed since.
    """
    for mlp in patched.mlps:
        if isinstance(mlp, MlpStructure):
            _check_linear_layers(mlp)
    for module, forward in patched.forwards:
        if module.__dict__.get("forward") is not forward:
            raise ValueError(CHANGED.format(f"the forward of {type(module).__name__}", "another library's kernels"))
    if not patched.running.is_generating:
        _check_attention(patched)
        _check_recompute(patched)


def _check_linear_layers(mlp: MlpStructure) -> None:
    """An adapter or a hook that was added to them later would do nothing: their weights are used, not they."""
    name, children = type(mlp.module).__name__, set(mlp.module.children())
    used: list[Any] = [layer for layer in (mlp.gate, mlp.up, mlp.down) if layer is not None]
    if not children.issuperset(used):
        raise ValueError(CHANGED.format(name, "an adapter"))
    if any(map(is_changed_by_user, used)):
        raise ValueError(CHANGED.format(f"a linear layer of {name}", "a hook"))


def require_unwrapped(model: Any) -> None:
    """Refuse a model that is wrapped: its plan calls the parts of the model, and would pass the wrapper by.

    Raises:
        ValueError: it is, or it is no model of transformers.
    """
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a plan is applied to a model of transformers, or to one with adapters of peft, and {name} is neither: "
            "call mst_ds.apply_plan before DeepSpeed, DDP, torch.compile or accelerate wrap the model"
        )
    if "forward" in model.__dict__:
        raise ValueError(
            f"the forward of {name} was replaced on this instance, such as by accelerate's mixed precision or a "
            "trainer, and a plan would pass that by: call mst_ds.apply_plan first"
        )


def require_outermost(undo: Undo) -> None:
    """Refuse to take off a plan below what has wrapped it, which would go as well.

    Raises:
        ValueError: a forward was wrapped since.
    """
    for module, planned in undo.outermost:
        current = module.__dict__.get("forward")
        # accelerate's unwrap_model makes a method of what it had wrapped.
        if current is not None and current is not planned and getattr(current, "__func__", None) is not planned:
            raise ValueError(
                f"the forward of {type(module).__name__} was wrapped after mst_ds.apply_plan, such as by accelerate's "
                "mixed precision or a trainer, which would go with the plan: take it off first (del model.forward)"
            )


def _check_attention(patched: PatchedModel) -> None:
    for own in patched.configs:
        config: Any = own.module.__dict__.get("config")
        if config is not own.config:
            raise ValueError(CHANGED.format(f"the config of {type(own.module).__name__}", "setting another"))
        name = config._attn_implementation_internal
        if name != own.attention:
            raise ValueError(
                f"the attention of {type(own.module).__name__} was set to {name!r} after mst_ds.apply_plan, whose own "
                f"knows documents and padding: call model.set_attn_implementation({own.attention!r}), or "
                "mst_ds.remove_plan(model) first"
            )


def _check_recompute(patched: PatchedModel) -> None:
    for layer in patched.layers:
        if getattr(layer, "gradient_checkpointing", False):
            raise ValueError(
                f'the recompute of {type(layer).__name__} was changed after mst_ds.apply_plan: set "recompute" in the '
                '"mst" block, and call mst_ds.remove_plan(model), then mst_ds.apply_plan again'
            )


def keep_recompute(modules: list[Any], layers: list[nn.Module], settings: Settings, undo: Undo) -> None:
    """Let the layers be computed again as the plan says, not by transformers, also after calls of its own switches,
    which its Trainer makes.

    Args:
        modules: that have such switches: the model and its decoder.
    """
    if not settings.recompute and any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        _leave_recompute("gradient_checkpointing_enable", settings.recompute)
    for layer in layers:
        undo.set_attribute(layer, "gradient_checkpointing", False)
    for module in modules if layers else []:
        for name in _SWITCHES_OF_RECOMPUTE:
            original = getattr(module, name, None)
            if original is not None:
                switch = functools.partial(_leave_recompute, name, settings.recompute)
                undo.set_attribute(module, name, functools.update_wrapper(switch, original))


def _leave_recompute(name: str, is_on: bool, *args: Any, **kwargs: Any) -> None:
    warnings.warn(
        f'{name}() changes nothing on a model with a plan of mst_ds: "recompute" in the "mst" block decides, and is '
        f"{str(is_on).lower()}",
        stacklevel=2,
    )
