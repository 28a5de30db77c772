"""Finds lightning attention, whose loop over blocks is written out in its forward: by what it computes on stand-ins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mst_ds.attention import Documents
from mst_ds.mixers import MixedSequence, lightning_attention
from mst_ds.structure import probe

_CHILDREN = ("qkv_proj", "norm", "output_gate", "out_proj")
_DECAYS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
_HEADS, _HEAD_DIM, _BLOCK = 2, 3, 4
_LENGTH = 2 * _BLOCK + 1


@dataclass(frozen=True)
class LightningStructure:
    """Projections around lightning attention: queries, keys and values behind an activation, a norm over all heads, a
    gate and a projection.

    It works on a shard whole: decays of a block are numbers of the model, and blocks begin with a document.
    """

    module: nn.Module
    attribute, carries = "forward", False

    def run(
        self, sequence: MixedSequence, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """What its own forward gives for each document of the sequence alone; (B, L, H) of this shard.

        Raises:
            ValueError: a cache, into which a state would have to go.
        """
        if past_key_values is not None:
            raise ValueError(
                f"{type(self.module).__name__} is given a cache for its state, which a plan does not keep: call it "
                "without one"
            )
        module: Any = self.module
        states = module.act_fn(module.qkv_proj(hidden_states)).unflatten(-1, (module.num_attention_heads, -1))
        slope, query_decay, key_decay, diagonal_decay = (getattr(module, name) for name in _DECAYS)
        decays = slope, query_decay, key_decay, diagonal_decay[0]
        heads = lightning_attention(sequence, *states.chunk(3, dim=-1), *decays)
        gate = torch.sigmoid(module.output_gate(hidden_states))
        return module.out_proj(gate * module.norm(heads.flatten(2))), None


def is_lightning(module: nn.Module) -> bool:
    """Whether a module has the parts of `LightningStructure`, and its own forward on stand-ins gives the same."""
    if not {*module._modules, *module._buffers}.issuperset((*_CHILDREN, *_DECAYS, "act_fn")):
        return False
    with probe.isolated_rng():
        small = _small(module)
        x = probe.random_tensor(2, _LENGTH, probe.HIDDEN)
        own = LightningStructure(small)

        def formula(x: Tensor) -> Tensor:
            return own.run(MixedSequence(None, Documents()), x)[0]

        def forward(x: Tensor) -> Tensor:
            output: Tensor = type(small).forward(small, x, position_embeddings=None, attention_mask=None)[0]
            return output

        return probe.is_same(formula, forward, [x], list(small.parameters()))


def _small(module: nn.Module) -> nn.Module:
    width = _HEADS * _HEAD_DIM
    sizes = {
        "qkv_proj": (probe.HIDDEN, 3 * width),
        "output_gate": (probe.HIDDEN, width),
        "norm": (width, width),  # of all heads of a token: any function of them shows where it is
        "out_proj": (width, probe.HIDDEN),
    }
    linears = {name: nn.Linear(*size, device="cpu", dtype=torch.float64) for name, size in sizes.items()}
    small = probe.with_stand_ins(module, linears)
    small.__dict__ |= {"num_attention_heads": _HEADS, "head_dim": _HEAD_DIM, "block_size": _BLOCK}
    # Decays that do not follow from each other, so that each shows where it is.
    shapes = [(_HEADS, 1, 1), *[(_HEADS, _BLOCK, 1)] * 2, (1, _HEADS, _BLOCK, _BLOCK)]
    small.__dict__["_buffers"] = {
        name: probe.random_tensor(*shape) for name, shape in zip(_DECAYS, shapes, strict=True)
    }
    return small
