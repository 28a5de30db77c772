"""A batch of whole sequences around a model that runs on shards: values in their order, gradients as of one rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_outputs import CausalLMOutput

from mst_ds.integrations.sharded import digest_of
from mst_ds.integrations.whole_batches import ShardedForward
from mst_ds.sequence_parallel import SequenceGroup, run_simulated
from mst_ds.topology import Topology

RANKS = 3
# Shards of 9 tokens, which are two chunks.
IDS = torch.arange(50).view(2, 25) % 7


class Head(nn.Module):
    """What a head says of a token follows from the token and from where it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1, 8, dtype=torch.float64))

    def forward(self, input_ids: Tensor, position_ids: Tensor, **_: Any) -> CausalLMOutput:
        values = self.weight[input_ids] * (position_ids + 1)
        return CausalLMOutput(loss=values.sum(), logits=values)


def loss_of(values: Tensor) -> Tensor:
    """Not a sum: what a token counts depends on all others."""
    return (values * torch.arange(values.numel()).view_as(values)).sum().square()


def of_rank(group: SequenceGroup) -> tuple[Tensor, Tensor]:
    head = Head()
    ShardedForward(Topology(group.rank, RANKS, RANKS), group, layer_chunks=2).attach(head)
    found = head(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS), fused_lm_head=True)
    assert found.loss is None
    return found.logits.detach(), torch.autograd.grad(loss_of(found.logits), head.weight)[0]


def test_values_and_gradients_are_those_of_one_rank() -> None:
    head = Head()
    values = head(input_ids=IDS, position_ids=torch.arange(25)).logits[:, :-1]
    expected = torch.autograd.grad(loss_of(values), head.weight)[0]
    results = run_simulated(of_rank, RANKS)
    assert all(found.equal(values) for found, _ in results)
    # As DDP and ZeRO average them.
    torch.testing.assert_close(torch.stack([gradient for _, gradient in results]).mean(dim=0), expected)


def test_a_batch_on_a_device_is_compared_there() -> None:
    """A collator has its batch on the CPU; a model's forward has it where the model is."""
    with FakeTensorMode():
        ids = torch.ones(2, 8, dtype=torch.int64, device="cuda")
        assert digest_of(ids, ids).device.type == "cuda"
