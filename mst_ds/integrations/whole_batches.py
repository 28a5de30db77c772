"""Batches of whole sequences in a trainer's loop: their losses need all log-probabilities, and models run on shards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mst_ds.integrations.sharded import DIGEST, require_same_batches, shard_of_batch
from mst_ds.sequence_parallel import SequenceGroup
from mst_ds.token_layout import TokenLayout
from mst_ds.topology import Topology

# What TRL's fused head is told beside the batch.
_OF_HEAD = ("fused_lm_head", "use_cache")


def count_sequences_once(accelerator: Any, topology: Topology) -> None:
    """Have this accelerator gather of one rank for each sequence, as it would be in a world of the data-parallel ranks:
    the ranks of a sequence know the same of it."""
    from accelerate.utils import recursively_apply

    gather = accelerator.gather

    def of_sequence(of_ranks: Tensor) -> Tensor:
        size = len(of_ranks) // topology.world_size
        return of_ranks.unflatten(0, (topology.world_size, size))[:: topology.sp_size].flatten(0, 1)

    accelerator.gather = lambda values: recursively_apply(of_sequence, gather(values))


class ShardedForward:
    """Around a model's forward with TRL's fused head: every rank of a sequence gives the whole batch and gets what the
    head says of all its tokens; the model itself runs on this rank's shard.

    Differentiating those values gives each rank the gradients of its own tokens, times the number of the sequence's
    ranks. Each rank makes the same loss of them, and gradients are averaged over all ranks, of which those of a
    sequence count as one.

    Raises:
        ValueError: the batch has what cannot be sharded, or is another one than on the sequence's other ranks. All of
            these raise it.
    """

    def __init__(self, topology: Topology, group: SequenceGroup, *, layer_chunks: int) -> None:
        self._topology = topology
        self._group = group
        self._layer_chunks = layer_chunks
        # Of the sequences in the forward that runs.
        self._seq_len = 0

    def attach(self, model: Any) -> None:
        """As hooks: TRL replaces the forward itself, later."""
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after, with_kwargs=True)

    def _before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not kwargs.get("fused_lm_head"):
            return None
        of_head = {name: kwargs[name] for name in _OF_HEAD if name in kwargs}
        whole = {name: value for name, value in kwargs.items() if name not in _OF_HEAD}
        shard = shard_of_batch(whole, self._topology, self._layer_chunks)
        digests = self._group.all_gather(shard.pop(DIGEST))
        require_same_batches(torch.stack(digests).tolist(), self._topology.sp_ranks[0])
        self._seq_len = whole["input_ids"].shape[1]
        return args, {**shard, **of_head}

    def _after(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            return None
        of_shard = kwargs["input_ids"].shape
        # The loss and the router loss are of this shard alone.
        return type(output)(
            **{
                # The last token predicts nothing, and has no place in what TRL expects.
                name: _Whole.apply(value, self._group, self._layer_chunks)[:, : self._seq_len - 1]
                for name, value in output.items()
                if getattr(value, "shape", None) == of_shard
            }
        )


class _Whole(torch.autograd.Function):
    """(B, L) -> (B, S), of the shards of all ranks."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: SequenceGroup, layer_chunks: int) -> Tensor:
        ctx.group, ctx.layout = group, TokenLayout(group.size, layer_chunks)
        return ctx.layout.join(group.all_gather(shard), dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.layout.part(gradient, ctx.group.rank, dim=1) * ctx.group.size, None, None
