"""Batches for each rank, from samples numbered over the whole world."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from mst_ds.config import IGNORE_INDEX
from mst_ds.data.order import SampleOrder
from mst_ds.data.packing import PackedDataset
from mst_ds.data.sharding import DOCUMENTS, Batch, shard
from mst_ds.rows.kinds import OLD_LOGPS
from mst_ds.topology import Topology

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Loading:
    """How batches are made: by torch's DataLoader, whose words these are.

    Args:
        num_workers: processes that make batches ahead; 0: each is made when it is asked for.
        pin_memory: whether they lie in pinned memory, from which they are copied to a device without waiting.
    """

    num_workers: int = 0
    pin_memory: bool = False

    def batches(self, shards: _Shards, starts: Iterable[int], *, keeps_workers: bool = False) -> DataLoader[Batch]:
        """The batches that begin at these samples, in their order. `iter` forks the workers; those that it keeps make
        the batches of every later `iter`, too."""
        return DataLoader(
            shards,
            batch_size=None,
            sampler=starts,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            persistent_workers=keeps_workers and self.num_workers > 0,
            pin_memory=self.pin_memory,
            worker_init_fn=_live_as_long_as_the_rank,
            # A forked worker has the tables and the order without copying them.
            multiprocessing_context="fork" if self.num_workers else None,
            # It draws a seed for its workers, which must not be one of the model's random numbers.
            generator=torch.Generator(),
        )


@dataclass(frozen=True)
class _Shards(torch.utils.data.Dataset[Batch]):
    """This rank's shard of each batch, by the number of the batch's first sample in the world; sample: by number."""

    dataset: PackedDataset
    topology: Topology
    micro_batch_size: int
    layer_chunks: int
    sample: Callable[[int], Batch]

    def __getitem__(self, start: int) -> Batch:
        first = start + self.topology.dp_rank * self.micro_batch_size
        samples = [self.sample(first + offset) for offset in range(self.micro_batch_size)]
        # Samples differ in how many there are, and every rank of a sequence group needs them all.
        documents = [sample.pop(DOCUMENTS) for sample in samples if DOCUMENTS in sample]
        batch = shard(_stack(samples), self.topology, self.dataset.pad_id, layer_chunks=self.layer_chunks)
        return batch | {DOCUMENTS: torch.cat(documents)} if documents else batch


class ShardedLoader(Iterator[Batch]):
    """Endless training batches, one shard per rank, all of the same size on all ranks.

    The order is one stream of permutations of the dataset. Data-parallel rank d takes every dp_size-th batch
    of it, beginning with the d-th, and the ranks of its sequence group each take their shard of that batch.
    An epoch that does not fill its last batches goes on in the next one, so no sample is dropped and no rank
    runs out before another. All there is to remember is `samples_seen`, counted over the whole world, of the batches
    that were handed out: those that were made ahead are made again where a run goes on.

    Args:
        micro_batch_size: B, samples in a batch of one data-parallel rank.
        seed: of the order, >= 0.
        layer_chunks: those of the plan, see `shard`.
        loading: how batches are made.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        topology: Topology,
        *,
        micro_batch_size: int,
        seed: int,
        layer_chunks: int = 1,
        loading: Loading = Loading(),
    ) -> None:
        self.dataset = dataset
        self.topology = topology
        self.micro_batch_size = micro_batch_size
        self.layer_chunks = layer_chunks
        self.samples_seen = 0
        self._loading = loading
        self._order = SampleOrder(len(dataset), seed)
        self._batches: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        """(B, L) tensors of a shard, see `shard`."""
        try:
            batch = next(self._begun())
        except Exception:
            self._batches = None  # who tries again gets the same batch
            raise
        self.samples_seen += self._samples_of_a_round
        return batch

    def start_workers(self) -> None:
        """Fork them now, from where the loader is in the data, and not at the first `next`.

        A fork shares the memory that its process has, and what this process then writes to is copied, page by page: so
        before there is much of that.
        """
        self._begun()

    @property
    def _samples_of_a_round(self) -> int:
        return self.topology.dp_size * self.micro_batch_size

    def _begun(self) -> Iterator[Batch]:
        if self._batches is None:
            starts = itertools.count(self.samples_seen, self._samples_of_a_round)
            # Nothing that leads back to this loader: workers end when the last reference to their iterator goes.
            sample = functools.partial(_sample, self.dataset, self._order)
            shards = _Shards(self.dataset, self.topology, self.micro_batch_size, self.layer_chunks, sample)
            self._batches = iter(self._loading.batches(shards, starts))
        return self._batches

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
        # What text that is split has no need of stands only in the fingerprints of others.
        names = [*here, *(name for name in ("too_long", "num_learned", "group") if name in state and name not in here)]
        differing = [name for name in names if state.get(name) != here.get(name)]
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
        self._batches = None


class EvalLoader(Iterable[Batch]):
    """Every sample once over all data-parallel ranks, in order, and equally many batches on every rank; each time that
    it is gone through, which must end before the next time.

    Where the samples run out, a rank gets padding with ignored labels: it takes part in every collective and
    adds nothing to the loss. The batches are those of `ShardedLoader`, of which the arguments are, too.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        topology: Topology,
        *,
        micro_batch_size: int,
        layer_chunks: int = 1,
        loading: Loading = Loading(),
    ) -> None:
        per_round = topology.dp_size * micro_batch_size
        starts = range(0, _round_up(len(dataset), per_round), per_round)
        sample = functools.partial(_sample_or_padding, dataset)
        shards = _Shards(dataset, topology, micro_batch_size, layer_chunks, sample)
        self._batches = loading.batches(shards, starts, keeps_workers=True)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def start_workers(self) -> None:
        """See `ShardedLoader`. They stay for all evaluations."""
        iter(self._batches)


def _sample_or_padding(dataset: PackedDataset, number: int) -> Batch:
    return dataset[number] if number < len(dataset) else _ignored_sample(dataset)


def _ignored_sample(dataset: PackedDataset) -> Batch:
    sample = {
        "input_ids": torch.full((dataset.seq_len,), dataset.pad_id),
        "labels": torch.full((dataset.seq_len,), IGNORE_INDEX),
        "position_ids": torch.arange(dataset.seq_len) % dataset.longest,
        "attention_mask": torch.zeros(dataset.seq_len, dtype=torch.int64),
    }
    if dataset.has_old_logps:
        sample[OLD_LOGPS] = torch.zeros(dataset.seq_len)
    if dataset.is_numbered:
        sample[DOCUMENTS] = torch.zeros(0, dtype=torch.int64)
    return sample


def _sample(dataset: PackedDataset, order: SampleOrder, position: int) -> Batch:
    return dataset[order[position]]


def _as_it_is(batch: Any) -> Any:
    return batch


def _live_as_long_as_the_rank(worker: int) -> None:
    """What asks a run to stop may reach all its processes: a worker ends when its rank says so, or is gone.

    A rank that was killed must leave none behind for a moment: it would hold the rank's port and output folder.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        while True:
            received = signal.sigwaitinfo(signals)
            if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _stack(samples: Sequence[Batch]) -> Batch:
    """B samples of (S,) to one batch of (B, S)."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
