"""Which settings a preflight tries, and that it tries none which the JSON rules out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mst_ds.preflight import cases_to_try
from mst_ds.settings import MstConfig, Settings


def test_cases_to_try() -> None:
    cases = cases_to_try(MstConfig(), packed=True)
    tried = [case.settings for case in cases]
    assert [(settings.sp_size, settings.mlp_chunks, settings.loss_chunks) for settings in tried] == [
        (1, 1, 1),
        (1, 4, 4),
        (1, 4, 4),
        (1, 64, 64),
        (2, 1, 1),
        (2, 4, 4),
        (2, 4, 4),
        (2, 64, 64),
    ]
    assert all(case.packed for case in cases)
    assert [settings.recompute for settings in tried] == [True, False, True, True] * 2
    kept = [(settings.keep_attention, settings.offload_activations) for settings in tried]
    assert kept == [(False, False), (False, False), (True, False), (True, True)] * 2
    assert [settings.keep_mlp for settings in tried] == [False, True, False, True] * 2
    assert [settings.head_groups for settings in tried] == [1] * 7 + [2]
    assert [settings.layer_chunks for settings in tried] == [1, 1, 4, 16] * 2
    # In each of 16 chunks of a layer three of the MLP.
    assert [case.min_tokens() for case in cases[:4]] == [4, 16, 48, 256]


def settings_to_try(**mst: Any) -> list[Settings]:
    return [case.settings for case in cases_to_try(MstConfig(mst), packed=True)]


def test_settings_that_the_json_rules_out_are_not_tried() -> None:
    tried = settings_to_try(sp_size=1, mlp_chunks=1, recompute=False)
    assert [(settings.sp_size, settings.mlp_chunks, settings.loss_chunks, settings.keep_mlp) for settings in tried] == [
        (1, 1, 1, False),
        (1, 1, 4, True),
        (1, 1, 4, False),
        (1, 1, 64, True),
    ]
    assert not any(settings.recompute for settings in tried)
    assert not any(settings.keep_attention or settings.offload_activations for settings in tried)
    assert {settings.layer_chunks for settings in tried} == {1}
    assert all(settings.recompute for settings in settings_to_try(recompute=True))
    kept = settings_to_try(keep_mlp=True)
    assert all(settings.keep_mlp for settings in kept)
    assert {settings.recompute for settings in kept} == {True, False}
    assert not any(settings.keep_mlp for settings in settings_to_try(keep_mlp=False))
    without_chunks = Settings(recompute=True, keep_attention=True)
    of_two = replace(without_chunks, sp_size=2)
    assert settings_to_try(
        layer_chunks=1, loss_chunks=1, mlp_chunks=1, sp_size=2, keep_attention=True, offload_activations=False
    ) == [
        without_chunks,
        replace(without_chunks, keep_mlp=True),
        of_two,
        replace(of_two, keep_mlp=True),
        replace(of_two, keep_mlp=True, head_groups=2),
    ]
    # Numbers of the user stand for any above 1, as those that are tried do.
    assert {settings.mlp_chunks for settings in settings_to_try(mlp_chunks=7)} == {1, 4, 64}
    streamed = settings_to_try(layer_chunks=7)
    assert {settings.layer_chunks for settings in streamed} == {1, 4, 16}
    assert all(settings.recompute for settings in streamed)
