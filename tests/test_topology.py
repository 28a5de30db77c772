"""Ranks, groups and shards."""

import pytest

from mst_ds.topology import Topology, choose_sp_size


def test_sp_is_innermost():
    places = [Topology(rank, world_size=6, sp_size=2) for rank in range(6)]
    assert [(place.dp_rank, place.sp_rank) for place in places] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]
    assert [place.sp_ranks for place in places] == [(0, 1), (0, 1), (2, 3), (2, 3), (4, 5), (4, 5)]
    assert {place.dp_size for place in places} == {3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 8, 3), "sp_size is 3, which does not divide the world size 8; allowed: 1, 2, 4, 8; nearest: 2"),
        ((0, 8, 0), "sp_size is 0"),
        ((8, 8, 2), "rank is 8; allowed: 0 to 7"),
        ((-1, 8, 2), "rank is -1"),
        ((0, 0, 1), "world_size is 0"),
    ],
)
def test_a_place_outside_the_world_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Topology(*values)


@pytest.mark.parametrize(
    ("world_size", "heads", "ranks_per_node", "expected"),
    [
        (8, 32, None, 8),
        (16, 32, 8, 8),  # stays within a node
        (16, 4, 8, 4),  # a query head for each rank
        (12, 32, 8, 4),  # divides both the node and the world
        (6, 4, None, 3),
        (5, 4, None, 1),
        (1, 4, None, 1),
    ],
)
def test_auto_takes_most_ranks_of_a_node(world_size, heads, ranks_per_node, expected):
    chosen = choose_sp_size("auto", world_size=world_size, num_attention_heads=heads, ranks_per_node=ranks_per_node)
    assert chosen == expected


def test_a_requested_size_is_kept_also_across_nodes_and_where_heads_are_uneven():
    assert choose_sp_size(16, world_size=16, num_attention_heads=32, ranks_per_node=8) == 16
    assert choose_sp_size(2, world_size=4, num_attention_heads=9) == 2


def test_a_requested_size_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="sp_size is 3, which does not divide the world size 4; allowed: 1, 2, 4"):
        choose_sp_size(3, world_size=4, num_attention_heads=32)
    message = "sp_size is 8, but the model has 6 query heads .*; allowed: 1, 2, 4; nearest: 4"
    with pytest.raises(ValueError, match=message):
        choose_sp_size(8, world_size=8, num_attention_heads=6)
