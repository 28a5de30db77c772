"""Tensors that transformers keeps in fp32 in a model of 16 bits, such as the router of a mixture of experts.

DeepSpeed keeps the buffers among them, but casts every parameter to the training dtype. Its fp32 master copy of a
trained one loses nothing; only the forward pass would see rounded values. So the module that holds such a parameter
reads it in fp32 here, from a buffer beside it: the master copy of a trained parameter, what was loaded of another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from mst_ds.dtypes import HALVES

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_SUFFIX = "_in_fp32"
_OF_ADAPTERS = (".base_layer.", ".original_module.", ".modules_to_save.", ".parametrizations.")


def kept_in_fp32(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Names of the parameters and persistent buffers that transformers keeps in fp32 when it loads `model` in `dtype`.

    Args:
        model: of transformers, without adapters; without memory will do.
    """
    if dtype not in HALVES:
        return []
    lists = ("_keep_in_fp32_modules_strict", *(("_keep_in_fp32_modules",) if dtype == torch.float16 else ()))
    words = {word for module in model.modules() for each in lists for word in getattr(module, each, None) or ()}
    if not words:
        return []
    # As transformers matches them: anywhere in the name.
    pattern = re.compile("|".join(word.replace("*", ".*") for word in sorted(words)))
    tensors = dict(model.named_parameters()) | persistent_buffers(model)
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and pattern.search(name)]


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are saved with the model, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def require_no_adapters_on(names: Sequence[str], adapted: nn.Module) -> None:
    """Refuse adapters of peft on what is kept in fp32: they read the parameter past its module.

    Args:
        adapted: the model with its adapters.

    Raises:
        ValueError: with the first name.
    """
    for name, _ in adapted.named_parameters():
        plain = "." + name
        for part in _OF_ADAPTERS:
            plain = plain.replace(part, ".", 1)
        if plain != "." + name and any(plain.endswith("." + kept) for kept in names):
            raise ValueError(
                f"the adapters change {name}, which transformers keeps in fp32; allowed: adapters on other weights"
            )


@dataclass
class KeptTensor:
    """The value of one in fp32, and where it belongs: `name` in `owner`."""

    owner: nn.Module
    name: str
    value: Tensor


class Loading:
    """Takes the values of what is kept in fp32 of a model that is loaded inside of `watch`.

    Args:
        names: see `kept_in_fp32`.
        is_sharded: under ZeRO-3, where tensors have 16 bits before they are loaded, and only rank 0 reads files.
    """

    def __init__(self, names: Sequence[str], *, is_sharded: bool) -> None:
        self._names, self._is_sharded = names, is_sharded
        self._read: dict[str, Tensor] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Sharded, each module's values are taken on their way into it."""
        last_names = {name.rpartition(".")[2] for name in self._names}
        watched: dict[nn.Module, Any] = {}

        def take(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
            for name in {prefix + last for last in last_names} & set(self._names) & state.keys():
                self._read[name] = state[name].detach().float().clone()

        def see(module: nn.Module, name: str, tensor: Tensor | None) -> None:
            if name in last_names and module not in watched:
                watched[module] = module.register_load_state_dict_pre_hook(take)

        registrations = [
            register(see)
            for register in (register_module_parameter_registration_hook, register_module_buffer_registration_hook)
            if self._is_sharded and self._names
        ]
        try:
            yield
        finally:
            for hook in (*registrations, *watched.values()):
                hook.remove()

    def kept(self, model: nn.Module) -> list[KeptTensor]:
        """Of the model that was loaded, without adapters yet. Sharded, a collective call."""
        return [self._kept(model, name) for name in self._names]

    def _kept(self, model: nn.Module, full_name: str) -> KeptTensor:
        import deepspeed
        import torch.distributed as dist

        prefix, _, name = full_name.rpartition(".")
        owner = model.get_submodule(prefix)
        tensor = getattr(owner, name)
        if not self._is_sharded:
            return KeptTensor(owner, name, tensor.detach().float().clone())
        with deepspeed.zero.GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
            value = tensor.detach().float().clone()
        if full_name in self._read:
            value.copy_(self._read[full_name])
        dist.broadcast(value, 0)
        return KeptTensor(owner, name, value)


def keep_in_fp32(engine: DeepSpeedEngine, kept: Sequence[KeptTensor]) -> None:
    """Have the engine's model read these tensors in fp32 from now on, and its optimizer begin from them.

    A collective call, where the same `kept` is on all ranks.

    Raises:
        ValueError: the optimizer has no fp32 copy of a trained parameter.
    """
    for each in kept:
        value = each.value.to(engine.device)
        if each.name in each.owner._buffers:
            each.owner._buffers[each.name] = value
            continue
        _read_in_fp32(each.owner, each.name, value)
        parameter = each.owner._parameters[each.name]
        assert parameter is not None
        if parameter.requires_grad:
            _set_master(parameter, value)
            if not _master(parameter).equal(value):
                raise ValueError(
                    f"{type(each.owner).__name__}.{each.name} is to stay in fp32, which this DeepSpeed config has no "
                    "master copy for; allowed: bf16 or fp16 with master weights in fp32"
                )
    if any(each.name in each.owner._parameters for each in kept):
        module, step = engine.module, -1

        def refresh(*_: object) -> None:
            nonlocal step
            if engine.global_steps != step:
                step = engine.global_steps
                fp32_parameters(module)

        module.register_forward_pre_hook(refresh)


def fp32_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are kept in fp32, by name, as the optimizer has them now. A collective call."""
    values: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for name in getattr(type(module), "names_in_fp32", ()):
            parameter, value = module._parameters[name], module._buffers[name + _SUFFIX]
            assert parameter is not None
            assert value is not None
            if parameter.requires_grad:
                value.copy_(_master(parameter))
            values[f"{prefix}.{name}" if prefix else name] = value
    return values


def set_fp32_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """The parameters kept in fp32 that are not trained get these values; those of the others are the optimizer's."""
    for prefix, module in model.named_modules():
        for name in getattr(type(module), "names_in_fp32", ()):
            value = module._buffers[name + _SUFFIX]
            assert value is not None
            value.copy_(values[f"{prefix}.{name}" if prefix else name])


class _InFp32(torch.autograd.Function):
    """`value`, whose gradient is the parameter's."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def _read_in_fp32(module: nn.Module, name: str, value: Tensor) -> None:
    """From now on `module.<name>` is `value`; its parameters and their names stay as they are."""

    def read(self: nn.Module) -> Tensor:
        parameter, fp32 = self._parameters[name], self._buffers[name + _SUFFIX]
        assert parameter is not None
        assert fp32 is not None
        if parameter.requires_grad and torch.is_grad_enabled():
            return _InFp32.apply(parameter, fp32)
        return fp32

    module.register_buffer(name + _SUFFIX, value, persistent=False)
    own = type(module)
    names = (*getattr(own, "names_in_fp32", ()), name)
    members = {name: property(read), "names_in_fp32": names, "__module__": own.__module__}
    module.__class__ = type(own.__name__, (own,), members)


def _master(parameter: nn.Parameter) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def _set_master(parameter: Any, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not hasattr(parameter, "ds_id"):
        safe_set_full_fp32_param(parameter, value)
        return
    # The function for the whole tensor fails where the ranks do not divide it.
    import torch.distributed as dist

    size = parameter.ds_tensor.numel()
    flat = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    safe_set_local_fp32_param(parameter, flat.narrow(0, size * dist.get_rank(), size))
