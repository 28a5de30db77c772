"""Scaling efficiency, by hand: tokens of these results cost as many FLOPs as a sequence has tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sweeps import done, point

from mst_ds.scaling.curves import strong_curves, weak_curves
from mst_ds.scaling.result import OUT_OF_MEMORY


def test_strong_scaling_is_the_same_step_on_more_ranks() -> None:
    results = [
        done(point(4, 4096, num_nodes=2, num_gpus=2), 300.0),
        done(point(1, 4096), 100.0),
        done(point(2, 4096, num_gpus=2), 150.0),
        done(point(1, 8192), 70.0),  # another length, alone
        done(point(1, 4096, num_gpus=2), 190.0),  # two sequences a step
        done(point(2, 4096, num_gpus=2, variant="b"), 1.0),
    ]
    (curve,) = strong_curves(results)
    assert (curve.group, curve.label) == ("a", "4K, 1 sequence a step")
    assert [result.world_size for result in curve.results] == [1, 2, 4]
    assert curve.speedups == pytest.approx((1, 1.5, 3))
    assert curve.efficiencies == pytest.approx((1, 0.75, 0.75))


def test_weak_scaling_by_more_sequences() -> None:
    results = [done(point(2, num_gpus=2, num_nodes=nodes), rate) for nodes, rate in ((1, 100.0), (2, 180.0))]
    (curve,) = weak_curves(results)
    assert curve.label == "more sequences of 1K, sp 2"
    assert curve.efficiencies == pytest.approx((1, 0.9))


def test_weak_scaling_by_longer_sequences_counts_flops() -> None:
    # As many tokens a second for each rank as before, of half the speed, but each costs twice as much.
    results = [done(point(1, 1024), 100.0), done(point(2, 2048, num_gpus=2), 100.0)]
    (curve,) = weak_curves(results)
    assert curve.label == "longer, 1K a rank, 1 sequence a step"
    assert curve.efficiencies == pytest.approx((1, 1))


def test_of_one_world_the_fastest_counts() -> None:
    slow, fast = point(num_nodes=2), point(num_gpus=2)
    (curve,) = weak_curves([done(point(), 100.0), done(slow, 110.0), done(fast, 190.0)])
    assert [result.name for result in curve.results] == [point().name, fast.name]


def test_what_is_not_done_or_alone_is_on_no_curve() -> None:
    failed = replace(done(point(num_gpus=2), 1.0), status=OUT_OF_MEMORY)
    assert weak_curves([done(point(), 100.0), failed]) == []


def test_predictions_have_curves_of_their_own() -> None:
    results = [
        done(point(num_gpus=size), 100.0, source=source)
        for source in ("measured", "predicted for H100")
        for size in (1, 2)
    ]
    measured, predicted = weak_curves(results)
    assert measured.is_measured
    assert not predicted.is_measured
    assert (measured.group, predicted.group) == ("a", "a, predicted for H100")
