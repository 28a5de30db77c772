"""The ways to train on a long sequence that are compared: the same weights, each behind its own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Any, TypeAlias
from unittest.mock import patch

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

import mst_ds
from mst_ds.config import GIB
from mst_ds.planner import DEFAULT_RESERVE, gpu_of_device

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Work:
    """What every contender is given: tokens in a sequence, and how many chunks to work in.

    Args:
        mlp_chunks: of all tokens, whatever `layer_chunks` is.
        layer_chunks: of this project's, in which it works through a whole layer.
    """

    seq_len: int
    mlp_chunks: int
    loss_chunks: int
    layer_chunks: int = 1


@dataclass(frozen=True)
class Contender:
    """A model that shares its weights with the other contenders' models.

    Args:
        name: a key of `CONTENDERS`.
        model: called with input_ids and labels, or with inputs_embeds.
        plan: of this project, else None.
    """

    name: str
    model: Any
    plan: mst_ds.Plan | None = None

    def loss(self, input_ids: Tensor, **batch: Tensor) -> Tensor:
        """The whole step's loss, each token's target the next one; input_ids (B, S). `batch` has other labels, or
        positions by which documents are told apart."""
        loss: Tensor = self.model(input_ids=input_ids, **{"labels": input_ids, **batch}).loss
        return loss

    def hidden_states(self, inputs_embeds: Tensor) -> Tensor:
        """What the decoder layers and the last norm make of (B, S, H), without embedding and head."""
        found = []
        hook = self.model.model.register_forward_hook(lambda *call: found.append(call[-1].last_hidden_state))
        try:
            self.model(inputs_embeds=inputs_embeds, logits_to_keep=1)
        finally:
            hook.remove()
        return found.pop()


Build: TypeAlias = Callable[[str, Any, Work], Contender]


def build_contender(name: str, model: nn.Module, work: Work) -> Contender:
    """Makes a contender that shares the weights of `model`, a Llama of transformers, which stays as it is."""
    return CONTENDERS[name](name, share_weights(model), work)


def share_weights(model: nn.Module) -> Any:
    """A copy of the modules, with the same parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _plain(name: str, model: Any, work: Work) -> Contender:
    return Contender(name, model)


def _recompute(name: str, model: Any, work: Work) -> Contender:
    # Later versions of transformers warn of the older name.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    return Contender(name, model)


def _liger(name: str, model: Any, work: Work) -> Contender:
    """liger-kernel's norms, rotary embedding, SwiGLU and loss in recomputed layers.

    Raises:
        ImportError: it is not installed.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from transformers.models.llama import modeling_llama as llama

    # What it replaces for all models is put back, so that the other contenders stay what they are.
    with patch.multiple(llama, LlamaRMSNorm=llama.LlamaRMSNorm, LlamaMLP=llama.LlamaMLP):
        apply_liger_kernel_to_llama(rope=False, model=model)
    plain: Any = llama.LlamaAttention.forward
    names = {**plain.__globals__, "apply_rotary_pos_emb": liger_rotary_pos_emb}
    forward = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    for layer in model.model.layers:
        layer.self_attn.forward = MethodType(forward, layer.self_attn)
    return _recompute(name, model, work)


def _chunk_checkpoint(name: str, model: Any, work: Work) -> Contender:
    """torch's checkpoint around each chunk of an MLP and of the loss, inside of recomputed layers."""

    def mlp_forward(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        chunks = x.chunk(work.mlp_chunks, dim=1)
        return torch.cat([checkpoint(forward, chunk, use_reentrant=False) for chunk in chunks], dim=1)

    def loss_of(hidden_states: Tensor, targets: Tensor) -> Tensor:
        chunks = zip(hidden_states.chunk(work.loss_chunks, dim=1), targets.chunk(work.loss_chunks, dim=1), strict=True)
        return sum(checkpoint(_mean_part, model, *chunk, _valid(targets), use_reentrant=False) for chunk in chunks)

    contender = _recompute(name, model, work)
    for layer in model.model.layers:
        layer.mlp.forward = _bind(mlp_forward, layer.mlp.forward)
    return replace(contender, model=_WithLoss(model, loss_of))


def _alst(name: str, model: Any, work: Work) -> Contender:
    """DeepSpeed's TiledMLP and TiledFusedLogitsLoss inside of recomputed layers (arXiv 2506.13996)."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP

    def mlp_forward(mlp: nn.Module, x: Tensor) -> Tensor:
        output: Tensor = TiledMLP.apply(type(mlp).forward, mlp, x, work.mlp_chunks, list(mlp.parameters()))
        return output

    def loss_of(hidden_states: Tensor, targets: Tensor) -> Tensor:
        count = _valid(targets)

        def part(model: Any, x: Tensor, y: Tensor) -> Tensor:
            return _mean_part(model, x, y, count)

        head = [model.lm_head.weight]
        loss: Tensor = TiledFusedLogitsLoss.apply(
            part, model, hidden_states, targets, None, work.loss_chunks, head, "sum"
        )
        return loss

    contender = _recompute(name, model, work)
    for layer in model.model.layers:
        layer.mlp.forward = _bind(mlp_forward, layer.mlp)
    return replace(contender, model=_WithLoss(model, loss_of))


def _mst_ds(name: str, model: Any, work: Work, **settings: Any) -> Contender:
    config = model.config
    settings = {
        "layer_chunks": work.layer_chunks,
        "mlp_chunks": -(-work.mlp_chunks // work.layer_chunks),
        "loss_chunks": work.loss_chunks,
        "recompute": True,
        "keep_attention": True,
        "offload_activations": False,
        "keep_mlp": False,
        "attention": "sdpa",
        **settings,
    }
    bf16 = next(model.parameters()).dtype == torch.bfloat16
    # Everything is chosen, so the memory to plan for changes nothing.
    ds_config = {"bf16": {"enabled": bf16}, "mst": settings}
    plan = mst_ds.make_plan(config, ds_config, world_size=1, seq_len=work.seq_len, device_memory=GIB)
    return Contender(name, mst_ds.apply_plan(model, plan), plan)


def _mst_ds_recompute(name: str, model: Any, work: Work) -> Contender:
    return _mst_ds(name, model, work, keep_attention=False)


def _mst_ds_offload(name: str, model: Any, work: Work) -> Contender:
    return _mst_ds(name, model, work, offload_activations=True)


def _mst_ds_no_recompute(name: str, model: Any, work: Work) -> Contender:
    """Without recompute, but gate and up are computed again."""
    without = {"recompute": False, "layer_chunks": 1, "keep_attention": "auto", "offload_activations": "auto"}
    return _mst_ds(name, model, work, **without)


def _mst_ds_keep_mlp(name: str, model: Any, work: Work) -> Contender:
    return _mst_ds(name, model, work, keep_mlp=True)


def _mst_ds_offload_mlp(name: str, model: Any, work: Work) -> Contender:
    return _mst_ds(name, model, work, keep_mlp=True, offload_activations=True)


def _mst_ds_planned(name: str, model: Any, work: Work) -> Contender:
    """What a user gets who sets nothing: all settings and chunk counts planned for the memory of the device."""
    device, config = model.device, model.config
    bf16 = next(model.parameters()).dtype == torch.bfloat16
    memory: dict[str, Any] = {"device_memory": psutil.virtual_memory().total}
    if device.type == "cuda":
        of_device = torch.cuda.get_device_properties(device).total_memory
        gpu = gpu_of_device(torch.cuda.get_device_name(device), of_device)
        memory = {"device_memory": of_device, "reserve": DEFAULT_RESERVE, "gpu": gpu}
    plan = mst_ds.make_plan(config, {"bf16": {"enabled": bf16}}, world_size=1, seq_len=work.seq_len, **memory)
    return Contender(name, mst_ds.apply_plan(model, plan), plan)


def _mst_ds_one_chunk(name: str, model: Any, work: Work) -> Contender:
    return _mst_ds(name, model, work, layer_chunks=1, mlp_chunks=1, loss_chunks=1)


def _streamed(build: Build, layer_chunks: int) -> Build:
    """The same in so many chunks of a layer, whatever the work says."""

    def build_streamed(name: str, model: Any, work: Work) -> Contender:
        return build(name, model, replace(work, layer_chunks=layer_chunks))

    return build_streamed


CONTENDERS: dict[str, Build] = {
    "no recompute": _plain,
    "recompute": _recompute,
    "chunk checkpoint": _chunk_checkpoint,
    "Liger + recompute": _liger,
    "DeepSpeed ALST": _alst,
    "mst_ds": _mst_ds,
    "mst_ds, attention again": _mst_ds_recompute,
    "mst_ds, offload": _mst_ds_offload,
    "mst_ds, MLP kept": _mst_ds_keep_mlp,
    "mst_ds, MLP kept, offload": _mst_ds_offload_mlp,
    "mst_ds, no recompute": _mst_ds_no_recompute,
    "mst_ds, one chunk": _mst_ds_one_chunk,
    "mst_ds, planned": _mst_ds_planned,
    "mst_ds, 4 layer chunks": _streamed(_mst_ds, 4),
    "mst_ds, 16 layer chunks": _streamed(_mst_ds, 16),
    "mst_ds, 16 layer chunks, offload": _streamed(_mst_ds_offload, 16),
    # Attention runs again and keys and values are projected again: StreamBP's way (arXiv 2506.03077) as a setting of
    # this project, not StreamBP itself.
    "mst_ds, as StreamBP": _streamed(_mst_ds_recompute, 16),
}
# Those whose layers are worked through in as many chunks as the work says.
IN_LAYER_CHUNKS = (
    "mst_ds, attention again",
    "mst_ds",
    "mst_ds, offload",
    "mst_ds, MLP kept",
    "mst_ds, MLP kept, offload",
)

# What some contenders need; each is left out where it is not installed.
_PACKAGES = {"Liger + recompute": "liger_kernel", "DeepSpeed ALST": "deepspeed"}


def missing_package(name: str) -> str | None:
    """The package that the contender needs and this machine lacks."""
    package = _PACKAGES.get(name)
    return package if package is not None and find_spec(package) is None else None


class _WithLoss(nn.Module):
    """A causal language model whose loss is computed from the hidden states, never from all logits."""

    def __init__(self, causal_lm: Any, loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self._loss_of = loss_of

    @property
    def model(self) -> Any:
        return self.causal_lm.model

    def forward(self, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return self.causal_lm(**kwargs)
        output = self.model(**kwargs)
        output.loss = self._loss_of(output.last_hidden_state, pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX))
        return output


def _bind(function: Callable[..., Tensor], first: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: function(first, x)


def _valid(targets: Tensor) -> Tensor:
    return (targets != IGNORE_INDEX).sum()


def _mean_part(model: Any, hidden_states: Tensor, targets: Tensor, count: Tensor) -> Tensor:
    """A chunk's part of the mean over all valid targets; fp32, as transformers' own loss."""
    logits = model.lm_head(hidden_states).float().flatten(0, -2)
    return cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum") / count
