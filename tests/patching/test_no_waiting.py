"""A forward and backward on a batch of `mst_ds.data.shard` has no step at which a host would wait for its device."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from plain_model import make_batch
from tiny import tiny_settings
from tiny_models import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mst_ds import apply_settings
from mst_ds.data import IGNORE_INDEX, ON_HOST, Batch, shard
from mst_ds.objectives import CROSS_ENTROPY
from mst_ds.sequence_parallel import SequenceGroup, run_simulated
from mst_ds.topology import Topology

LENGTH = 30
# The second row ends in padding.
DOCUMENTS = ([12, 8, 10], [3, 17, 10])
# Whose result, or its shape, the host reads: a value, or how many there are.
WAITED_FOR = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount", "equal"}


class WaitingError(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    """Operators for which a host waits fail, as on fake tensors, but on any device and also inside transformers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_selection = func._opname in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if func._opname in WAITED_FOR or is_selection:
            raise WaitingError(str(func))
        return func(*args, **(kwargs or {}))


def packed_and_padded() -> Batch:
    ids = make_batch(LENGTH)["input_ids"]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
    mask = torch.ones_like(ids)
    mask[1, -DOCUMENTS[1][-1] :] = 0
    labels = ids.masked_fill((positions == 0) | (mask == 0), IGNORE_INDEX)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask}


def step(model: torch.nn.Module, batch: Batch) -> None:
    num_items = torch.tensor(7)  # what a run has summed over its ranks, on the device
    with NoWaiting():
        CROSS_ENTROPY.measure(model, batch, num_items).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# Plain, with a window, with norms of heads, with a window in some layers and softcap, with learned positions.
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "gpt2"])
def test_the_host_never_waits(name: str) -> None:
    model = apply_settings(tiny_model(name), tiny_settings(keep_attention=True))
    step(model, shard(packed_and_padded(), Topology(0, 1, 1)))


def test_nor_does_it_on_shards() -> None:
    model, batch = tiny_model("llama"), packed_and_padded()
    copies = [copy.deepcopy(model) for _ in range(2)]

    def run(group: SequenceGroup) -> bool:
        own = apply_settings(copies[group.rank], tiny_settings(2), sequence_group=group)
        step(own, shard(batch, Topology(group.rank, 2, 2)))
        return True

    assert run_simulated(run, 2) == [True, True]


class OnDevice(Tensor):
    """A tensor of which each operation is noted: on a device the host would wait for any that reads it."""

    noted: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.noted.append(func.__name__)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def test_a_table_that_a_trainer_has_moved_is_read_once() -> None:
    model = apply_settings(tiny_model("llama"), tiny_settings(keep_attention=True))
    batch = shard(packed_and_padded(), Topology(0, 1, 1))
    batch["document_table"] = batch["document_table"].as_subclass(OnDevice)
    OnDevice.noted.clear()
    step(model, batch)
    assert OnDevice.noted == ["tolist"]


def test_by_positions_alone_it_waits() -> None:
    batch = shard(packed_and_padded(), Topology(0, 1, 1))
    without_table = {name: tensor for name, tensor in batch.items() if name not in ON_HOST}
    with pytest.raises(WaitingError):
        step(apply_settings(tiny_model("llama"), tiny_settings()), without_table)
