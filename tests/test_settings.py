"""The knobs: what the "mst" block may say, what a search tries, and how settings are described."""

import dataclasses
import re
from pathlib import Path

import pytest

from mst_ds.settings import KNOBS, MstConfig, Settings, candidates, table

README = Path(__file__).parents[1] / "README.md"


def test_an_empty_mst_block_is_all_auto():
    assert MstConfig.from_dict({}) == MstConfig.from_dict(dict.fromkeys([*KNOBS, "reserve_gib"], "auto")) == MstConfig()
    assert {MstConfig().get(name) for name in KNOBS} == {"auto"}


def test_mst_values_are_kept():
    block = {
        "sp_size": 2,
        "layer_chunks": 4,
        "mlp_chunks": 8,
        "loss_chunks": 4,
        "recompute": True,
        "keep_attention": True,
        "offload_activations": False,
        "keep_mlp": False,
        "head_groups": 2,
        "attention": "sdpa",
        "device_memory_gib": 79.5,
        "reserve_gib": 1.5,
    }
    mst = MstConfig.from_dict(block)
    assert {name: mst.get(name) for name in KNOBS} == {name: block[name] for name in KNOBS}
    assert (mst.device_memory_gib, mst.reserve_gib) == (79.5, 1.5)
    assert set(block) == {*KNOBS, "device_memory_gib", "reserve_gib"}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"mlp_chunk": 2},
            "unknown key 'mlp_chunk'; nearest: 'mlp_chunks'; allowed: sp_size, layer_chunks, mlp_chunks",
        ),
        ({"zzz": 2}, "unknown key 'zzz'; allowed"),
        ({"sp_size": 0}, "sp_size in 'mst' is 0; allowed: 'auto' or a whole number >= 1"),
        ({"mlp_chunks": True}, "mlp_chunks in 'mst' is True"),
        ({"loss_chunks": 2.0}, "loss_chunks in 'mst' is 2.0"),
        ({"recompute": "yes"}, "recompute in 'mst' is 'yes'; allowed: 'auto' or true or false"),
        ({"keep_attention": 1}, "keep_attention in 'mst' is 1; allowed: 'auto' or true or false"),
        ({"offload_activations": "cpu"}, "offload_activations in 'mst' is 'cpu'; allowed: 'auto' or true or false"),
        ({"head_groups": 0}, "head_groups in 'mst' is 0; allowed: 'auto' or a whole number >= 1"),
        *(
            ({"recompute": False, key: True}, f"{key} in 'mst' is True, but recompute is False .*; allowed: 'auto' or")
            for key in ("keep_attention", "offload_activations")
        ),
        (
            {"recompute": False, "layer_chunks": 2},
            "layer_chunks in 'mst' is 2, but recompute is False .*; allowed: 'auto' or 1, or recompute true",
        ),
        ({"keep_mlp": "all"}, "keep_mlp in 'mst' is 'all'; allowed: 'auto' or true or false"),
        (
            {"attention": "eager"},
            "attention in 'mst' is 'eager'; allowed: 'auto' or sdpa or flash_attention_2",
        ),
        ({"device_memory_gib": 0}, "device_memory_gib in 'mst' is 0"),
        ({"reserve_gib": -1}, "reserve_gib in 'mst' is -1; allowed: 'auto' or a number >= 0"),
        ({"reserve_gib": False}, "reserve_gib in 'mst' is False"),
        ({"device_memory_gib": float("inf")}, "device_memory_gib in 'mst' is inf"),
        ({"device_memory_gib": 2**31}, "device_memory_gib in 'mst' is 2147483648; allowed"),
        ({"mlp_chunks": 2**37}, "mlp_chunks in 'mst' is 137438953472; allowed"),
        ([], r"'mst' is \[\]; allowed: an object"),
    ],
)
def test_a_bad_mst_block_is_refused(block, message):
    with pytest.raises(ValueError, match=message):
        MstConfig.from_dict(block)


def test_a_search_tries_what_is_not_settled_in_the_order_of_preference():
    names = ("recompute", "keep_attention", "offload_activations", "keep_mlp")
    everything = [tuple(chosen[name] for name in names) for chosen in candidates({})]
    assert everything == [
        (False, False, False, True),
        (False, False, False, False),
        (True, True, False, True),
        (True, True, False, False),
        (True, True, True, True),
        (True, True, True, False),
        (True, False, False, True),
        (True, False, False, False),
        (True, False, True, True),
        (True, False, True, False),
    ]
    settled = [tuple(chosen.values()) for chosen in candidates({"keep_attention": True, "keep_mlp": False})]
    assert settled == [(True, True, False, False), (True, True, True, False)]
    assert {chosen["recompute"] for chosen in candidates({"layer_chunks": 2})} == {True}
    without = MstConfig.from_dict({"recompute": False, "layer_chunks": 1}).given
    assert {chosen["recompute"] for chosen in candidates(without)} == {False}


def test_settings_are_described_by_the_names_of_the_block():
    off = Settings()
    assert str(off) == "sp_size 1, layer_chunks 1, mlp_chunks 1, loss_chunks 1, head_groups 1, attention sdpa"
    on = Settings(sp_size=2, mlp_chunks=3, loss_chunks=4, recompute=True, keep_mlp=True, attention="flash_attention_2")
    assert str(on) == (
        "sp_size 2, layer_chunks 1, mlp_chunks 3, loss_chunks 4, recompute, keep_mlp, head_groups 1, "
        "attention flash_attention_2"
    )


def test_each_knob_is_whole():
    """What a preflight tries has one value for each of its cases, and every default is allowed."""
    for name, knob in KNOBS.items():
        default = getattr(Settings(), name)
        assert knob.is_allowed(default), name
        assert all(knob.is_allowed(value) for value in (*knob.choices, *knob.tried)), name
        assert (knob.several > 0) == (type(default) is int), name
    assert all(knob.tried for knob in KNOBS.values() if knob.needs_recompute)
    assert all(knob.several for knob in KNOBS.values() if knob.needs_sharding)
    rows = {len(knob.tried) for name, knob in KNOBS.items() if knob.tried and name != "sp_size"}
    assert rows == {4}


def test_the_readmes_table_is_that_of_the_knobs():
    assert table() in README.read_text(encoding="utf-8")
    assert len(re.findall(r"^\| `", table(), re.MULTILINE)) == len(dataclasses.fields(Settings)) + 2
