from __future__ import annotations

import multiprocessing
import subprocess
from collections.abc import Callable
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from mst_ds.data import IGNORE_INDEX, ON_HOST, Batch, EvalLoader, Loading, PackedDataset, ShardedLoader
from mst_ds.data.order import SampleOrder, permutation
from mst_ds.token_layout import TokenLayout
from mst_ds.topology import Topology

Packed = Callable[..., PackedDataset]
LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 2)]  # dp_size, sp_size


def world(
    dataset: PackedDataset, dp_size: int, sp_size: int, micro: int = 1, seed: int = 7, workers: int = 0
) -> list[ShardedLoader]:
    size = dp_size * sp_size
    topologies = [Topology(rank, size, sp_size) for rank in range(size)]
    settings = {"micro_batch_size": micro, "seed": seed, "loading": Loading(num_workers=workers)}
    return [ShardedLoader(dataset, topology, **settings) for topology in topologies]


def whole_rows(parts: list[Batch], sp_size: int, seq_len: int) -> list[list[int]]:
    """The samples that the ranks hold together, in the order of the data-parallel ranks; padding cut off."""
    rows = []
    for first in range(0, len(parts), sp_size):
        joined = torch.cat([part["input_ids"] for part in parts[first : first + sp_size]], dim=1)
        rows += joined[:, :seq_len].tolist()
    return rows


def samples_of(loaders: list[ShardedLoader], steps: int) -> list[int]:
    """The numbers of the samples that all ranks get in `steps` steps."""
    sp_size, seq_len = loaders[0].topology.sp_size, loaders[0].dataset.seq_len
    rows = [row for _ in range(steps) for row in whole_rows([next(each) for each in loaders], sp_size, seq_len)]
    # The tokens of the test corpus count up from 0, so a sample's first token tells its number.
    return [row[0] // seq_len for row in rows]


@pytest.mark.parametrize(("dp_size", "sp_size"), LAYOUTS)
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_every_sample_once_an_epoch_in_one_order_at_every_layout(
    packed: Packed, dp_size: int, sp_size: int, micro: int
) -> None:
    dataset = packed(num_samples=7)
    epochs = 2 * dp_size * micro

    samples = samples_of(world(dataset, dp_size, sp_size, micro), steps=2 * 7)

    assert [sorted(samples[7 * epoch : 7 * epoch + 7]) for epoch in range(epochs)] == [[*range(7)]] * epochs
    assert samples == samples_of(world(dataset, 1, 1), steps=7 * epochs)


def test_every_token_of_the_corpus_once_an_epoch(packed: Packed) -> None:
    dataset = packed(num_samples=6, seq_len=7)
    loaders = world(dataset, dp_size=2, sp_size=3)

    rows = [row for _ in range(3) for row in whole_rows([next(each) for each in loaders], 3, 7)]

    seen = [token for row in rows for token in row if token != dataset.pad_id]
    assert sorted(seen) == list(range(dataset.num_tokens))


def test_each_epoch_has_an_order_of_its_own_from_its_first_sample_on(packed: Packed) -> None:
    samples = samples_of(world(packed(num_samples=20), 1, 1), steps=60)

    orders = [samples[start : start + 20] for start in (0, 20, 40)]
    assert len({tuple(order) for order in orders}) == 3
    assert [permutation(20, 7, epoch).tolist() for epoch in range(3)] == orders


def test_order_is_the_same_in_every_version_of_numpy() -> None:
    assert permutation(10, 42, 0).tolist() == [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]


def test_position_means_the_same_sample_whatever_was_asked_before() -> None:
    forwards, backwards = SampleOrder(5, seed=3), SampleOrder(5, seed=3)

    assert [forwards[position] for position in range(25)] == [backwards[position] for position in range(24, -1, -1)][
        ::-1
    ]


@pytest.mark.parametrize("micro", [1, 3])
def test_all_ranks_have_equal_batches_where_the_samples_do_not_divide(packed: Packed, micro: int) -> None:
    loaders = world(packed(num_samples=7, seq_len=5), dp_size=2, sp_size=2, micro=micro)

    for _ in range(10):
        for batch in (next(loader) for loader in loaders):
            assert {tensor.shape for name, tensor in batch.items() if name not in ON_HOST} == {(micro, 3)}


def test_leaving_early_leaves_nothing_behind(packed: Packed) -> None:
    whole = samples_of(world(packed(num_samples=8), 1, 2), steps=8)
    loaders = world(packed(num_samples=8), 1, 2)

    seen = []
    for taken in (3, 1, 4):
        parts = [list(islice(iter(loader), taken)) for loader in loaders]
        for step in zip(*parts, strict=True):
            seen += [row[0] // 5 for row in whole_rows(list(step), 2, 5)]

    assert seen == whole


@pytest.mark.parametrize(("dp_size", "sp_size"), LAYOUTS)
def test_resumed_run_goes_on_with_the_same_samples_at_any_layout(packed: Packed, dp_size: int, sp_size: int) -> None:
    dataset = packed(num_samples=10)
    before = world(dataset, 2, 2, micro=3)
    samples_of(before, steps=4)
    states = [loader.state_dict() for loader in before]
    expected = samples_of(before, steps=4)

    after = world(dataset, dp_size, sp_size, seed=1234)
    for loader in after:
        loader.load_state_dict(states[-1])

    fingerprint = {"packing": "documents", "seq_len": 5, "num_samples": 10, "num_tokens": 49}
    assert states == [{"samples_seen": 24, "seed": 7} | fingerprint] * 4
    assert samples_of(after, steps=24 // dp_size) == expected


def test_what_workers_made_ahead_is_made_again_where_a_run_goes_on(packed: Packed) -> None:
    dataset = packed(num_samples=10)
    expected = samples_of(world(dataset, 2, 1), steps=6)

    (*before,) = world(dataset, 2, 1, workers=2)
    seen = samples_of(before, steps=3)
    (*after,) = world(dataset, 2, 1, workers=1)
    for loader in after:
        loader.load_state_dict(before[0].state_dict())

    assert before[0].state_dict()["samples_seen"] == 6
    assert seen + samples_of(after, steps=3) == expected


def workers_beside(others: set[Any]) -> set[int | None]:
    return {worker.pid for worker in set(multiprocessing.active_children()) - others}


def test_workers_that_are_started_early_make_the_batches_from_where_a_run_goes_on(packed: Packed) -> None:
    dataset = packed(num_samples=10)
    before, expected = world(dataset, 1, 1), world(dataset, 1, 1)
    samples_of(before, steps=3)
    samples_of(expected, steps=3)
    others = set(multiprocessing.active_children())
    (loader,) = world(dataset, 1, 1, workers=1)
    loader.load_state_dict(before[0].state_dict())
    loader.start_workers()
    started = workers_beside(others)

    assert loader.state_dict() == before[0].state_dict()
    assert samples_of([loader], steps=4) == samples_of(expected, steps=4)
    assert len(started) == 1
    assert workers_beside(others) == started


def test_workers_that_are_started_early_make_the_batches_of_all_evaluations(packed: Packed) -> None:
    dataset, topology = packed(num_samples=10), Topology(0, 1, 1)
    expected = [batch["input_ids"].tolist() for batch in EvalLoader(dataset, topology, micro_batch_size=2)]
    others = set(multiprocessing.active_children())
    loader = EvalLoader(dataset, topology, micro_batch_size=2, loading=Loading(num_workers=1))
    loader.start_workers()
    started = workers_beside(others)

    for _ in range(2):
        assert [batch["input_ids"].tolist() for batch in loader] == expected
        assert workers_beside(others) == started
    assert len(started) == 1


def test_a_worker_outlives_the_signals_that_stop_a_run(packed: Packed) -> None:
    dataset = packed(num_samples=10)
    others = set(multiprocessing.active_children())
    (loader,) = world(dataset, 1, 1, workers=1)
    seen = samples_of([loader], steps=1)
    (worker,) = set(multiprocessing.active_children()) - others
    for name in ("USR1", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)

    # More than were made ahead.
    assert seen + samples_of([loader], steps=5) == samples_of(world(dataset, 1, 1), steps=6)
    worker.terminate()  # as this process does when it ends
    worker.join(timeout=60)
    assert worker.exitcode == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_draw_none_of_the_models_random_numbers(packed: Packed, workers: int) -> None:
    (loader,) = world(packed(num_samples=10), 1, 1, workers=workers)
    before = torch.get_rng_state()
    next(loader)
    list(EvalLoader(loader.dataset, loader.topology, micro_batch_size=1, loading=Loading(workers)))

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("lengths", "samples", "says"),
    [
        ((5, 44), {"packing": "none"}, "saved with packing 'documents', but this run has packing 'none'; allowed"),
        ((3, 46), {"seq_len": 6}, "seq_len 5 and num_samples 10, but this run has seq_len 6 and num_samples 8"),
        ((3, 45), {}, "num_tokens 49, but this run has num_tokens 48"),
        ((3, 46), {"max_samples": 9}, "num_samples 10, but this run has num_samples 9"),
        ((2, 47), {"documents": np.array([1])}, "with num_tokens 49, but this run has num_tokens 47; allowed"),
    ],
)
def test_position_in_other_samples_is_refused(
    packed: Packed,
    token_rows: Callable[..., datasets.Dataset],
    lengths: tuple[int, ...],
    samples: dict[str, Any],
    says: str,
) -> None:
    (before,) = world(packed(num_samples=10), 1, 1)
    next(before)
    other = PackedDataset(token_rows(*lengths), **({"seq_len": 5, "pad_id": 0} | samples))
    (after,) = world(other, 1, 1, seed=8)

    with pytest.raises(ValueError, match=r"^the position in the data was saved with .*; allowed: .*\Z") as caught:
        after.load_state_dict(before.state_dict())

    assert says in str(caught.value)
    assert after.state_dict() == world(other, 1, 1, seed=8)[0].state_dict(), "refused, but taken over"


def test_position_without_a_fingerprint_is_refused(packed: Packed) -> None:
    (loader,) = world(packed(num_samples=10), 1, 1)

    with pytest.raises(ValueError, match="saved with packing None"):
        loader.load_state_dict({"samples_seen": 3, "seed": 7})


@pytest.mark.parametrize("name", ["samples_seen", "seed"])
@pytest.mark.parametrize("value", [None, -1, 1.5, "3", [3], True, 2**63])
def test_position_that_is_no_number_is_refused(packed: Packed, name: str, value: object) -> None:
    (loader,) = world(packed(num_samples=10), 1, 1)
    before = loader.state_dict()

    with pytest.raises(ValueError, match=f"was saved with {name} .*; allowed: a whole number"):
        loader.load_state_dict({**before, name: value})
    assert loader.state_dict() == before


@pytest.mark.parametrize(("dp_size", "sp_size"), LAYOUTS)
@pytest.mark.parametrize("micro", [1, 3])
def test_evaluation_sees_each_sample_once_with_equally_many_batches(
    packed: Packed, dp_size: int, sp_size: int, micro: int
) -> None:
    dataset = packed(num_samples=7)
    size = dp_size * sp_size
    batches = [list(EvalLoader(dataset, Topology(rank, size, sp_size), micro_batch_size=micro)) for rank in range(size)]

    assert {len(rank) for rank in batches} == {-(-7 // (dp_size * micro))}
    rows = [row for step in zip(*batches, strict=True) for row in whole_rows(list(step), sp_size, 5)]
    assert [row for row in rows if row != [dataset.pad_id] * 5] == [dataset[i]["input_ids"].tolist() for i in range(7)]
    labels = torch.cat([batch["shift_labels"].flatten() for rank in batches for batch in rank])
    # A sample of 5 tokens has 4 labels, but the first sample has two documents and the last is one token short.
    assert (labels != IGNORE_INDEX).sum() == 7 * 4 - 2
    mask = torch.cat([batch["attention_mask"].flatten() for rank in batches for batch in rank])
    assert mask.sum() == dataset.num_tokens


def test_batches_are_sharded_in_the_chunks_of_the_plan(packed: Packed) -> None:
    dataset, layout = packed(num_samples=3, seq_len=16), TokenLayout(2, chunks=2)
    topologies = [Topology(rank, 2, 2) for rank in range(2)]
    settings = {"micro_batch_size": 1, "layer_chunks": 2}
    held_out = [list(EvalLoader(dataset, topology, **settings)) for topology in topologies]
    training = [[next(ShardedLoader(dataset, topology, seed=7, **settings))] for topology in topologies]

    for of_ranks, numbers in ((held_out, [*range(3)]), (training, [SampleOrder(3, 7)[0]])):
        for parts, number in zip(zip(*of_ranks, strict=True), numbers, strict=True):
            for name in ("input_ids", "position_ids", "attention_mask"):
                whole = layout.join([part[name] for part in parts], dim=1)
                assert torch.equal(whole[0], dataset[number][name])


def test_ranks_beyond_the_last_sample_get_ignored_labels(packed: Packed) -> None:
    (batch,) = EvalLoader(packed(num_samples=2, seq_len=8), Topology(3, 4, 1), micro_batch_size=2)

    assert (batch["shift_labels"] == IGNORE_INDEX).all()
    assert (batch["attention_mask"] == 0).all()
    assert batch["position_ids"].tolist() == [[*range(8)]] * 2
    assert batch["input_ids"].shape == (2, 8)


def test_batches_do_not_depend_on_the_state_of_any_generator(packed: Packed) -> None:
    first = samples_of(world(packed(num_samples=10), 1, 1), steps=10)
    torch.manual_seed(1)
    np.random.seed(1)

    assert samples_of(world(packed(num_samples=10), 1, 1), steps=10) == first
    assert samples_of(world(packed(num_samples=10), 1, 1, seed=8), steps=10) != first


def test_a_batch_that_could_not_be_read_is_read_again(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = packed(num_samples=10)
    expected = samples_of(world(dataset, 1, 1), steps=3)
    (loader,) = world(dataset, 1, 1)
    seen = samples_of([loader], steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(PackedDataset, "__getitem__", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(loader)
    assert seen + samples_of([loader], steps=2) == expected
