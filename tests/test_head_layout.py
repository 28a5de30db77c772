from __future__ import annotations

import pytest

from mst_ds.geometry import HeadLayout

LAYOUTS = [
    HeadLayout(heads, key_values, sp_size)
    for heads in range(1, 17)
    for key_values in range(1, heads + 1)
    if heads % key_values == 0
    for sp_size in range(1, heads + 1)
]


def test_every_query_head_is_on_one_rank_and_the_load_is_balanced() -> None:
    for layout in LAYOUTS:
        ranges = [layout.query_heads(rank) for rank in range(layout.sp_size)]
        assert [head for heads in ranges for head in heads] == list(range(layout.num_heads)), layout
        lengths = [len(heads) for heads in ranges]
        assert max(lengths) - min(lengths) <= 1, layout


def test_a_rank_has_the_key_value_heads_that_its_query_heads_read_and_no_other() -> None:
    for layout in LAYOUTS:
        for rank in range(layout.sp_size):
            read = {head // layout.group_size for head in layout.query_heads(rank)}
            assert set(layout.key_value_heads(rank)) == read, (layout, rank)


def test_the_index_names_the_key_value_head_of_each_query_head() -> None:
    for layout in LAYOUTS:
        for rank in range(layout.sp_size):
            heads, key_values = layout.query_heads(rank), layout.key_value_heads(rank)
            index = layout.key_value_index(rank)
            if index is None:  # what a kernel with grouped heads does by itself
                index = [position // (len(heads) // len(key_values)) for position in range(len(heads))]
            assert [key_values[i] for i in index] == [head // layout.group_size for head in heads], (layout, rank)


def test_no_repetition_where_ranks_hold_whole_groups() -> None:
    layout = HeadLayout(32, 8, 4)
    assert [layout.key_value_index(rank) for rank in range(4)] == [None] * 4
    assert HeadLayout(9, 3, 2).key_value_index(0) == [0, 0, 0, 1, 1]


def test_refused_head_counts() -> None:
    with pytest.raises(ValueError, match="sp_size 5 is above the number of query heads 4"):
        HeadLayout(4, 2, 5)
    with pytest.raises(ValueError, match="9 query heads are no multiple of 2 key/value heads"):
        HeadLayout(9, 2, 1)
