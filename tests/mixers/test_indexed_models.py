"""Models whose attention is to picked keys train exactly, packed and sharded; foreign and misplaced picks are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiers import slow_but_for
from torch import Tensor
from transformers import AutoConfig

from mst_ds.attention import Documents
from mst_ds.mixers import Indexer, MixedSequence
from mst_ds.preflight import Case, Check, check_model
from mst_ds.sequence_parallel.sequence_attention import SequenceAttention
from mst_ds.settings import Settings

ONE_RANK = Case(Settings(recompute=True, mlp_chunks=3, loss_chunks=3), packed=True)
SHARDED = Case(
    Settings(sp_size=2, recompute=True, keep_attention=True, head_groups=2, mlp_chunks=3, loss_chunks=3), packed=True
)
AGAIN = Case(Settings(sp_size=2, recompute=True), packed=True)
KEPT = Case(Settings(sp_size=2), packed=False)
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v32": {"num_hidden_layers": 2},
    # A shared layer takes the picks of the layer before it.
    "glm_moe_dsa": {"num_hidden_layers": 3, "indexer_types": ["full", "shared", "full"]},
    "axk2": {"num_hidden_layers": 2},
    "hy_v4": {"num_hidden_layers": 3},  # with sinks; the third layer is a shared one
}
# fp64; measured: up to 2.2e-14.
TOLERANCE = 1e-11


def check(model_type: str, *cases: Case) -> tuple[Check, ...]:
    return check_model(AutoConfig.for_model(model_type, **MODELS[model_type]), cases).checks


@pytest.mark.parametrize("model_type", slow_but_for(["glm_moe_dsa"], MODELS))
def test_models_with_an_indexer_are_exact(model_type: str) -> None:
    for each in check(model_type, ONE_RANK, SHARDED, AGAIN, KEPT):
        assert each.is_exact, (each.refusal, each.defect)
        assert max(each.loss_error or 0.0, each.gradient_error or 0.0) < TOLERANCE


def test_keys_of_another_document_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Indexer.__call__

    def over_documents(self: Indexer, sequence: MixedSequence, *args: Any, **kwargs: Any) -> Tensor:
        return original(self, MixedSequence(sequence.group, Documents()), *args, **kwargs)

    monkeypatch.setattr(Indexer, "__call__", over_documents)
    for each in check("deepseek_v32", ONE_RANK, SHARDED):
        assert each.defect is not None
        assert each.defect.startswith("model.layers.0.self_attn: ")


def test_picks_of_another_shard_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SequenceAttention._with_all_picks

    def reversed_shards(self: SequenceAttention, picks: Tensor) -> SequenceAttention:
        gathered = original(self, picks)
        whole = gathered.attention.picks
        assert whole is not None
        whole.copy_(torch.cat(whole.chunk(2, dim=1)[::-1], dim=1))
        return gathered

    monkeypatch.setattr(SequenceAttention, "_with_all_picks", reversed_shards)
    (sharded,) = check("deepseek_v32", SHARDED)
    assert sharded.defect is not None
    assert sharded.defect.startswith("model.layers.0.self_attn: ")
