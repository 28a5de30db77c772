"""Models with layers that are not attention train exactly, packed and sharded; what is lost of a state is found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiers import slow_but_for
from torch import Tensor
from transformers import AutoConfig

import mst_ds.mixers.convolution
from mst_ds.mixers.carried import CarriedState
from mst_ds.mixers.scan import Scan
from mst_ds.preflight import Case, Check, check_model
from mst_ds.settings import Settings

# A first chunk of a layer, one in between and a last, where its state is carried.
IN_CHUNKS = Settings(recompute=True, layer_chunks=3, mlp_chunks=3, loss_chunks=3)
ONE_RANK = Case(IN_CHUNKS, packed=True)
SHARDED = Case(replace(IN_CHUNKS, sp_size=2), packed=True)
KEPT = Case(Settings(sp_size=2), packed=False)
# Each kind of layer once; with this number of layers the kinds follow as the models' own rules have them.
LAYERS = ["linear_attention", "full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": {"num_hidden_layers": 2, "layer_types": LAYERS},
    "qwen3_next": {"num_hidden_layers": 2, "layer_types": LAYERS},
    "olmo_hybrid": {"num_hidden_layers": 2, "layer_types": LAYERS},
    "kimi_linear": {"num_hidden_layers": 2, "layer_types": LAYERS},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": LAYERS},
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "falcon_h1": {"num_hidden_layers": 2},
    "jamba": {},
    "nemotron_h": {},  # layers that are an MLP, experts or a mixer and nothing else
    "minimax": {"num_hidden_layers": 2},
    "recurrent_gemma": {"num_hidden_layers": 2, "block_types": ["recurrent", "attention"]},
    # Without attention.
    "mamba": {},
    "falcon_mamba": {},
    "mamba2": {},
}
WITH_STATE = {
    "granitemoehybrid": "model.layers.0.mamba",
    "minimax": "model.layers.1.self_attn",
    "recurrent_gemma": "model.layers.0.temporal_block.rg_lru",
    "mamba": "backbone.layers.0.mixer",
}
QUICK = ("lfm2", "granitemoehybrid", "minimax", "mamba2")


def check(model_type: str, *cases: Case) -> tuple[Check, ...]:
    return check_model(AutoConfig.for_model(model_type, **MODELS[model_type]), cases).checks


@pytest.mark.parametrize("model_type", slow_but_for(QUICK, MODELS))
def test_models_with_other_layers_are_exact(model_type: str) -> None:
    for each in check(model_type, ONE_RANK, SHARDED, KEPT):
        assert each.is_exact, (each.refusal, each.defect)


@pytest.mark.parametrize("model_type", slow_but_for(("granitemoehybrid", "recurrent_gemma"), WITH_STATE))
def test_a_foreign_documents_state_is_found(monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    monkeypatch.setattr(Scan, "_by_document", lambda self, sequence, given, run, state: run(given, state))
    for each in check(model_type, ONE_RANK, SHARDED):
        assert each.defect is not None
        assert each.defect.startswith(f"{WITH_STATE[model_type]}: ")


def test_a_state_that_does_not_reach_the_next_chunk_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = CarriedState.enter
    monkeypatch.setattr(CarriedState, "enter", lambda *args: None if (state := original(*args)) is None else 0 * state)
    (sharded,) = check("granitemoehybrid", SHARDED)
    assert sharded.defect is not None
    assert sharded.defect.startswith("model.layers.0.mamba: its output ")


def test_a_gradient_that_does_not_reach_the_chunk_before_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CarriedState, "take_gradient", lambda self, chunk: None)
    (sharded,) = check("granitemoehybrid", SHARDED)
    assert sharded.defect is not None
    assert sharded.defect.startswith("model.layers.0.mamba: the gradient of its input ")


@pytest.mark.parametrize(
    ("model_type", "module"),
    [("lfm2", "model.layers.0.conv"), ("recurrent_gemma", "model.layers.0.temporal_block")],
)
def test_a_lost_token_of_a_convolutions_tail_is_found(
    monkeypatch: pytest.MonkeyPatch, model_type: str, module: str
) -> None:
    original = mst_ds.mixers.convolution.tokens_before

    def without_the_first(*args: Any) -> tuple[Tensor, Tensor]:
        before, last = original(*args)
        return torch.cat([torch.zeros_like(before[:, :, :1]), before[:, :, 1:]], dim=2), last

    monkeypatch.setattr(mst_ds.mixers.convolution, "tokens_before", without_the_first)
    (sharded,) = check(model_type, SHARDED)
    assert sharded.defect is not None
    assert sharded.defect.startswith(f"{module}: ")
