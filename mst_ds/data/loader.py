"""Batches for each rank, from samples numbered over the whole world."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mst_ds.config import IGNORE_INDEX
from mst_ds.data.order import SampleOrder
from mst_ds.data.packing import PackedDataset
from mst_ds.data.sharding import Batch, shard
from mst_ds.topology import Topology


class ShardedLoader(Iterator[Batch]):
    """Endless training batches, one shard per rank, all of the same size on all ranks.

    The order is one stream of permutations of the dataset. Data-parallel rank d takes every dp_size-th batch
    of it, beginning with the d-th, and the ranks of its sequence group each take their shard of that batch.
    An epoch that does not fill its last batches goes on in the next one, so no sample is dropped and no rank
    runs out before another. All there is to remember is `samples_seen`, counted over the whole world.

    Args:
        micro_batch_size: B, samples in a batch of one data-parallel rank.
        seed: of the order, >= 0.
    """

    def __init__(self, dataset: PackedDataset, topology: Topology, *, micro_batch_size: int, seed: int) -> None:
        self.dataset = dataset
        self.topology = topology
        self.micro_batch_size = micro_batch_size
        self.samples_seen = 0
        self._order = SampleOrder(len(dataset), seed)

    def __next__(self) -> Batch:
        """{"input_ids", "shift_labels", "position_ids", "attention_mask"}: (B, L), see `shard`."""
        start = self.samples_seen + self.topology.dp_rank * self.micro_batch_size
        samples = [self.dataset[self._order[start + offset]] for offset in range(self.micro_batch_size)]
        self.samples_seen += self.topology.dp_size * self.micro_batch_size
        return shard(_stack(samples), self.topology, self.dataset.pad_id)

    def state_dict(self) -> dict[str, int | str]:
        """The position in the stream, the same on every rank; it can go on at any dp_size and sp_size.

        With it goes the dataset's fingerprint: in other samples the same position is another place in the data.
        """
        return {"samples_seen": self.samples_seen, "seed": self._order.seed, **self.dataset.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the batches handed out before `state` was made, in the order of its seed.

        Raises:
            ValueError: `state` was made with other samples, by another packing or seq_len or of other documents; or its
                numbers are none.
        """
        here = self.dataset.fingerprint
        differing = [name for name in here if state.get(name) != here[name]]
        if differing:
            saved, own = (
                " and ".join(f"{name} {samples.get(name)!r}" for name in differing) for samples in (state, here)
            )
            raise ValueError(
                f"the position in the data was saved with {saved}, but this run has {own}; allowed: the packing, "
                "seq_len, dataset, seed and held-out part with which it was saved"
            )
        for name in ("samples_seen", "seed"):
            value = state.get(name)
            if type(value) is not int or not 0 <= value < 2**63:
                raise ValueError(
                    f"the position in the data was saved with {name} {value!r}; allowed: a whole number from 0 on"
                )
        self.samples_seen = state["samples_seen"]
        self._order = SampleOrder(len(self.dataset), state["seed"])


def eval_batches(dataset: PackedDataset, topology: Topology, *, micro_batch_size: int) -> Iterator[Batch]:
    """Every sample once over all data-parallel ranks, in order, and equally many batches on every rank.

    Where the samples run out, a rank gets padding with ignored labels: it takes part in every collective and
    adds nothing to the loss. The batches are those of `ShardedLoader`.
    """
    per_round = topology.dp_size * micro_batch_size
    for start in range(topology.dp_rank * micro_batch_size, _round_up(len(dataset), per_round), per_round):
        numbers = range(start, start + micro_batch_size)
        samples = [dataset[number] if number < len(dataset) else _ignored_sample(dataset) for number in numbers]
        yield shard(_stack(samples), topology, dataset.pad_id)


def _ignored_sample(dataset: PackedDataset) -> Batch:
    return {
        "input_ids": torch.full((dataset.seq_len,), dataset.pad_id),
        "labels": torch.full((dataset.seq_len,), IGNORE_INDEX),
        "position_ids": torch.arange(dataset.seq_len),
        "attention_mask": torch.zeros(dataset.seq_len, dtype=torch.int64),
    }


def _stack(samples: Sequence[Batch]) -> Batch:
    """B samples of (S,) to one batch of (B, S)."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
