"""The longest sequences that others have published, against what is planned with their settings."""

import functools
from typing import Any

import pytest
from tiers import slow_but_for

from benchmarks.working_set import working_set
from mst_ds.config import GIB
from mst_ds.model_shape import load_model_shape
from mst_ds.planner import DEFAULT_RESERVE, longest_seq_len, make_plan

# Llama 8B on 8 H100 of 80 GB under DeepSpeed ALST (arXiv 2506.13996): ZeRO-3, optimizer on the host, recompute. A rung
# is (sp_size, chunked MLP, activations on the host); all have the chunked loss.
PUBLISHED = {
    (1, False, False): 160_000,
    (8, False, False): 1_100_000,
    (8, True, False): 1_200_000,
    (8, False, True): 2_400_000,
    (8, True, True): 3_700_000,
}


MODEL = "meta-llama/Llama-3.1-8B"
SETTINGS: dict[str, Any] = {
    "world_size": 8,
    "device_memory": 79 * GIB,
    "reserve": DEFAULT_RESERVE,
    "host_memory": 1900 * GIB // 8,
}


def ds_config_of(*, chunks_mlp: bool, offloads: bool) -> dict[str, Any]:
    return {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "mst": {
            "mlp_chunks": "auto" if chunks_mlp else 1,
            "recompute": True,
            "keep_attention": False,
            "offload_activations": offloads,
            "head_groups": 1,
        },
    }


@pytest.mark.parametrize("rung", slow_but_for([(8, False, False)], PUBLISHED), ids=str)
def test_published_lengths_are_predicted(rung: tuple[int, bool, bool]) -> None:
    sp_size, chunks_mlp, offloads = rung
    longest = longest_of_alst(sp_size, chunks_mlp=chunks_mlp, offloads=offloads)
    assert longest == pytest.approx(PUBLISHED[rung], rel=0.3)


@pytest.mark.parametrize("rung", slow_but_for([(8, False, False)], PUBLISHED), ids=str)
def test_what_is_planned_for_this_project_is_no_shorter(rung: tuple[int, bool, bool]) -> None:
    """With the same settings; its MLP and norms need less."""
    sp_size, chunks_mlp, offloads = rung
    ds_config = ds_config_of(chunks_mlp=chunks_mlp, offloads=offloads)
    longest = longest_seq_len(MODEL, ds_config, sp_size=sp_size, **SETTINGS)
    assert longest >= longest_of_alst(sp_size, chunks_mlp=chunks_mlp, offloads=offloads)


def test_the_base_without_tiling_is_predicted() -> None:
    """32K tokens with transformers' own loss, which takes 14 bytes a logit at its peak: the logits in 16 bits, in fp32,
    their log-softmax, and its gradient. All else is as planned."""
    ds_config = ds_config_of(chunks_mlp=False, offloads=False)
    ds_config["mst"] |= {"loss_chunks": 1, "layer_chunks": 1}
    plan = make_plan(MODEL, ds_config, sp_size=1, seq_len=32 * 1024, **SETTINGS)
    (loss,) = (phase for phase in plan.phases if phase.name == "loss")
    of_loss = sum(term.bytes for term in loss.terms if term.name.startswith("loss_"))
    of_tokens = (loss.kind_bytes("activation") - of_loss) / plan.seq_len + 14 * load_model_shape(MODEL).vocab_size
    states = loss.device_bytes - loss.kind_bytes("activation")
    assert (plan.device_memory - states) / of_tokens == pytest.approx(32 * 1024, rel=0.15)


# Two contenders stand for all rungs, and each takes seconds to trace.
traced_working_set = functools.cache(working_set)


def longest_of_alst(sp_size: int, *, chunks_mlp: bool, offloads: bool) -> int:
    """With a layer's backward as DeepSpeed computes it, measured on its own code; all else as planned.

    A plan is of this project's MLP and norms, which need half of that. Activations grow with a rank's tokens.
    """
    seq_len, ds_config = 2**20, ds_config_of(chunks_mlp=chunks_mlp, offloads=offloads)
    plan = make_plan(MODEL, ds_config, sp_size=sp_size, seq_len=seq_len, **SETTINGS)
    (backward,) = (phase for phase in plan.phases if phase.name == "backward")
    kept = sum(term.bytes for term in backward.terms if term.name == "layer_inputs" and term.place == "device")
    layer = (
        traced_working_set("DeepSpeed ALST" if chunks_mlp else "recompute")
        * plan.shard_length
        * load_model_shape(MODEL).hidden_size
        * 2
    )
    states = backward.device_bytes - backward.kind_bytes("activation")
    return int(seq_len * (plan.device_memory - states) / (kept + layer))
