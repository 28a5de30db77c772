"""Batches of sharded sequences in a trainer's loop: who gets which, what ranks count together, what they average."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mst_ds.config import IGNORE_INDEX
from mst_ds.data.sharding import Batch, shard
from mst_ds.topology import Topology

if TYPE_CHECKING:
    from accelerate import Accelerator

# A number that batches of other tokens hardly share; the model does not get it.
DIGEST = "batch_digest"
_OF_SHARDS = ("input_ids", "labels", "position_ids", "attention_mask")
# Other words for what position_ids say, which the collators of batches without padding add.
_OTHER_WORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def deal_samples(accelerator: Accelerator, topology: Topology, *, shard_chunks: int | None) -> None:
    """Have this accelerator make loaders of which the ranks of a sequence get the same batches.

    The samples are dealt to the data-parallel ranks, as accelerate deals them to processes.

    Args:
        shard_chunks: each rank gets its shard of a batch, of so many layer chunks; None: all of it.
    """
    prepare = functools.partial(_prepare_loader, accelerator, topology, shard_chunks)
    accelerator.prepare_data_loader = prepare


def _prepare_loader(
    accelerator: Any, topology: Topology, shard_chunks: int | None, loader: DataLoader[Any], *args: Any, **kwargs: Any
) -> DataLoader[Any]:
    from accelerate.data_loader import prepare_data_loader

    if not getattr(loader, "_is_accelerate_prepared", False):
        if shard_chunks is not None:
            loader.collate_fn = functools.partial(_collate, loader.collate_fn, topology, shard_chunks)
        # Ranks of a sequence draw the same order: without a generator of its own a sampler would take the model's
        # random numbers, which dropout moves on.
        sampler: Any = getattr(loader.batch_sampler, "sampler", None)
        if getattr(sampler, "generator", torch) is None:
            sampler.generator = torch.Generator().manual_seed(torch.initial_seed())
        loader = prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=topology.dp_size,
            process_index=topology.dp_rank,
            split_batches=accelerator.split_batches,
            put_on_device=accelerator.device_placement,
            rng_types=accelerator.rng_types.copy(),
            dispatch_batches=False,
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )
    accelerator._dataloaders.append(loader)
    return loader


def _collate(collate: Callable[[Any], Any], topology: Topology, layer_chunks: int, samples: Any) -> Batch:
    return shard_of_batch(collate(samples), topology, layer_chunks)


def shard_of_batch(batch: Mapping[str, Any], topology: Topology, layer_chunks: int) -> Batch:
    """This rank's shard of a collator's batch, with a digest of all of it.

    Raises:
        ValueError: the batch has what cannot be sharded, or not what shards need.
    """
    given = {name: value for name, value in batch.items() if name not in _OTHER_WORDS and value is not None}
    if unknown := sorted(given.keys() - set(_OF_SHARDS)):
        raise ValueError(
            f"a batch has {', '.join(unknown)}, which sequence parallelism does not shard; allowed with sp_size "
            f"{topology.sp_size}: {', '.join(_OF_SHARDS)}"
        )
    if missing := [name for name in ("input_ids", "labels") if name not in given]:
        raise ValueError(f"a batch has no {missing[0]}, which shards are made of; allowed: a collator that makes them")
    if len(given) < len(batch) and "position_ids" not in given:
        raise ValueError(
            "documents of a sharded batch are told apart by position_ids; allowed: a collator that makes them"
        )
    digest = digest_of(given["input_ids"], given["labels"])
    return {**shard(given, topology, layer_chunks=layer_chunks), DIGEST: digest}


def digest_of(*whole: Tensor) -> Tensor:
    """Of (B, S) tensors of one device, in a collator's worker or in a forward, a number there: ()."""
    values = torch.stack(whole).flatten()
    return (values * torch.arange(1, 2 * values.numel(), 2, device=values.device)).sum()


def count_items(accelerator: Accelerator, shards: Sequence[Batch], topology: Topology, device: torch.device) -> Tensor:
    """The labels of these micro-batches on each rank, (world_size,). A collective call.

    Raises:
        ValueError: the ranks of a sequence hold shards of different batches. Every rank raises it.
    """
    count = sum(int((batch["shift_labels"] != IGNORE_INDEX).sum()) for batch in shards)
    digest = functools.reduce(lambda before, batch: (31 * before + int(batch[DIGEST])) % 2**62, shards, 0)
    mine = torch.tensor([[count, digest]], device=device)
    counts, digests = accelerator.gather(mine).T.tolist()
    for first in range(0, topology.world_size, topology.sp_size):
        require_same_batches(digests[first : first + topology.sp_size], first)
    return torch.tensor(counts, device=device)


def require_same_batches(digests: Sequence[int], first: int) -> None:
    """Refuse batches of a sequence's ranks that differ.

    Args:
        digests: of each rank's batch.
        first: the first of the ranks.

    Raises:
        ValueError: they differ.
    """
    if len(set(digests)) > 1:
        raise ValueError(
            f"ranks {first} to {first + len(digests) - 1} share their sequences and were given different batches; "
            "allowed: a dataset, sampler and collator that give every rank the same"
        )


def sum_of_sequence(of_ranks: Tensor, topology: Topology) -> Tensor:
    """Of numbers of all ranks, (world_size,), the sum over those that share this rank's sequences."""
    first = topology.sp_ranks[0]
    return of_ranks[first : first + topology.sp_size].sum()


def gather_of_sequences(accelerator: Any, topology: Topology, losses: Tensor) -> Tensor:
    """The losses of all samples of an evaluation's batch, of one rank for each sequence, without the samples that
    accelerate repeats at the end."""
    of_ranks = accelerator.gather(losses).view(topology.world_size, -1)
    of_samples = of_ranks[:: topology.sp_size].flatten()
    state = accelerator.gradient_state
    return of_samples[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else of_samples
