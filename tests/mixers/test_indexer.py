"""What an indexer picks of packed and sharded sequences: what it picks of each document alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mst_ds import apply_settings, remove_plan
from mst_ds.attention import Documents
from mst_ds.memory.live import LiveMemory
from mst_ds.mixers import Indexer, MixedSequence
from mst_ds.sequence_parallel import run_simulated
from mst_ds.settings import Settings
from mst_ds.structure import find_indexers
from mst_ds.structure.indexers import IndexerStructure

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "mlp_layer_types": ["dense"] * 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "index_head_dim": 8,
    # With many heads hardly a score is 0, and which of equal ones is picked is left to chance.
    "index_n_heads": 16,
    "index_topk": 5,
    "bos_token_id": None,
    "eos_token_id": None,
}
LENGTH = 36
STARTS = [[0, 20, 24], [0, 29]]


def model_of(model_type: str = "deepseek_v32", **changed: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | changed))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().train()


def indexer_of(model: Any) -> IndexerStructure:
    return find_indexers(model)[0]


def operator_of(found: IndexerStructure) -> Indexer:
    return Indexer(found.module.forward, found.top_k, found.width)


def inputs(length: int = LENGTH) -> dict[str, Any]:
    torch.manual_seed(1)
    angles = torch.randn(2, length, 4, dtype=torch.float64)
    return {
        "hidden_states": torch.randn(2, length, 16, dtype=torch.float64),
        "q_resid": torch.randn(2, length, 12, dtype=torch.float64),
        "position_embeddings": (angles.cos(), angles.sin()),
        "position_ids": torch.arange(length)[None],
    }


def part(given: Any, rows: slice, tokens: slice) -> Any:
    if isinstance(given, dict):
        return {name: part(each, rows, tokens) for name, each in given.items()}
    if isinstance(given, tuple):
        return tuple(part(each, rows, tokens) for each in given)
    return given[rows if len(given) > 1 else slice(None), tokens]


def seen(picks: Tensor, top_k: int) -> Iterator[list[int]]:
    """Of each query of a document, (T, k), the keys that it attends to, whichever picks stand for none."""
    for query, of_query in enumerate(picks.tolist()):
        yield list(range(query + 1)) if query < top_k else sorted(key for key in of_query if 0 <= key <= query)


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mst_ds.geometry.ELEMENTS_IN_CACHE_OF_CPU", 16 * 36 * 3)
    monkeypatch.setattr("mst_ds.mixers.indexer._KEY_TOKENS", 7)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("sp_size", [1, 2, 3])
def test_picks_are_those_of_each_document_alone(sp_size: int) -> None:
    found = indexer_of(model_of())
    operator, given = operator_of(found), inputs()

    def pick(group: Any) -> Tensor:
        rank, length = 0 if group is None else group.rank, LENGTH // sp_size
        of_shard = part(given, slice(None), slice(rank * length, (rank + 1) * length))
        return operator(MixedSequence(group, Documents(STARTS)), attention_mask=None, **of_shard)

    picks = torch.cat(run_simulated(pick, sp_size) if sp_size > 1 else [pick(None)], dim=1)
    assert picks.shape == (2, LENGTH, 5)
    for row, starts in enumerate(STARTS):
        for start, stop in pairwise([*starts, LENGTH]):
            mask = torch.ones(1, stop - start, stop - start, dtype=torch.bool).tril()
            alone = found.module(attention_mask=mask, **part(given, slice(row, row + 1), slice(start, stop)))
            assert alone.shape[2] == min(5, stop - start)
            assert list(seen(picks[row, start:stop] - start, 5)) == list(seen(alone[0], 5))


def test_short_documents_are_not_scored() -> None:
    def never(hidden_states: Tensor, attention_mask: Any = None, past_key_values: Any = None) -> Tensor:
        raise AssertionError

    operator = Indexer(never, 20, 128)
    picks = operator(MixedSequence(None, Documents([[0, 20], [0, 16]])), inputs()["hidden_states"])
    assert picks.shape == (2, LENGTH, 20)


def test_an_indexer_that_picks_another_number_is_refused() -> None:
    found = indexer_of(model_of())
    operator = Indexer(found.module.forward, 6, found.width)
    with pytest.raises(ValueError, match="an indexer picks 5 of 36 keys; allowed: 6, its index_topk"):
        operator(MixedSequence(None, Documents()), attention_mask=None, **inputs())


def peak_bytes(operator: Indexer, length: int) -> int:
    given = inputs(length)
    with LiveMemory() as memory:
        operator(MixedSequence(None, Documents()), attention_mask=None, **given)
    return memory.peak


@pytest.mark.usefixtures("short_blocks")
def test_memory_is_linear_in_the_length() -> None:
    operator = operator_of(indexer_of(model_of()))
    assert peak_bytes(operator, 256) < 2.1 * peak_bytes(operator, 128)


@pytest.mark.parametrize("keep_attention", [False, True])
def test_layers_that_are_computed_again_pick_the_same(monkeypatch: pytest.MonkeyPatch, keep_attention: bool) -> None:
    model = apply_settings(model_of(), Settings(recompute=True, keep_attention=keep_attention))
    original, picked = Indexer.__call__, []

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        picked.append(original(*args, **kwargs))
        return picked[-1]

    monkeypatch.setattr(Indexer, "__call__", noted)
    ids = torch.randint(0, 97, (1, LENGTH))
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(picked) == (2 if keep_attention else 4)
    assert keep_attention or all(map(torch.equal, picked[:2], picked[:1:-1]))
    of_indexers = [parameter.grad for name, parameter in model.named_parameters() if "indexer" in name]
    assert len(of_indexers) == 10
    assert not any(grad.any() for grad in of_indexers if grad is not None)


def test_a_model_generates_and_is_itself_without_its_plan() -> None:
    model, ids = model_of(), torch.randint(0, 97, (1, 12))
    before, generated = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    apply_settings(model, Settings(recompute=True))
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)
    remove_plan(model)
    assert torch.equal(model(ids).logits, before)


def test_shards_in_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="layer_chunks is 3, and DeepseekV32ForCausalLM has DeepseekV32Indexer"):
        apply_settings(model_of(), Settings(sp_size=2, recompute=True, layer_chunks=3), sequence_group=None)
