"""The activation terms against live bytes: a step of a real, patched layer needs what the plan says."""

from functools import partial

import pytest
import torch
import transformers
from tiers import slow_but_for

from mst_ds import apply_plan, make_plan
from mst_ds.attention import blockwise
from mst_ds.config import GIB
from mst_ds.memory.dry_run import KernelWorkspace
from mst_ds.memory.live import LiveMemory
from mst_ds.recompute import stores

TOKENS, CHUNKS, VOCAB = 1024, 8, 64
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": TOKENS,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Olmo2": {},
    "Gemma2": {"head_dim": 16},
    "Gemma3Text": {"head_dim": 16},
    "Cohere": {},
    "Phi3": {"resid_pdrop": 0.0},
    "GPTNeoX": {"num_key_value_heads": None},
    "Mixtral": {},
    "Qwen3Moe": {**EXPERTS, "head_dim": 16},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 64},
}
# These are there before the step, or are DeepSpeed's.
NOT_MEASURED = {"parameters", "master_parameters", "optimizer_moments", "reduce_bucket"}
KEPT = (
    *({"recompute": False, "keep_mlp": keep_mlp} for keep_mlp in (False, True)),
    *(
        {"keep_mlp": keep_mlp, "keep_attention": keep_attention, "offload_activations": offload_activations}
        | {"recompute": True}
        for keep_mlp in (False, True)
        for keep_attention in (False, True)
        for offload_activations in (False, True)
    ),
)


def planned_and_measured(family, changes, *, dtype="bf16", chunks=CHUNKS, **mst):
    """Bytes of the backward's activations and gradients on the device, by the plan and as they are alive."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    plan = make_plan(
        config,
        {
            "bf16": {"enabled": dtype == "bf16"},
            "zero_optimization": {"stage": 1},
            "gradient_accumulation_steps": 2,
            "mst": {"mlp_chunks": chunks, "loss_chunks": CHUNKS, "attention": "sdpa"} | mst,
        },
        world_size=1,
        seq_len=TOKENS,
        device_memory=GIB,
    )
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch_dtype).train()
    apply_plan(model, plan)
    input_ids = torch.randint(2, VOCAB, (1, TOKENS))
    with LiveMemory() as memory, KernelWorkspace():
        for parameter in model.parameters():  # as an earlier micro-batch leaves them
            parameter.grad = torch.zeros_like(parameter)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blockwise, "is_on_cpu", lambda _: False)  # blocks as on an accelerator
            patch.setattr(stores, "_empty_on_host", partial(uncounted, memory, stores._empty_on_host))
            loss = model(input_ids=input_ids, labels=input_ids).loss
            memory.reset_peak()
            loss.backward()
    (backward,) = (phase for phase in plan.phases if phase.name == "backward")
    terms = {
        term.name: term.bytes for term in backward.terms if term.place == "device" and term.name not in NOT_MEASURED
    }
    return terms, memory.peak


def uncounted(memory, function, *args):
    with memory.leave_out():
        return function(*args)


QUICK = KEPT[-2:]  # all is kept, on the device and on the host
# Llama has all that can be kept; of other families the layers are their own, as they are computed once and again.
COMPUTED = KEPT[:3]
CASES = [(family, mst) for family in FAMILIES for mst in KEPT if family == "Llama" or mst in (*COMPUTED, *QUICK)]
QUICK_CASES = [case for case in CASES if case[0] == "Llama" or case[1] in QUICK]


@pytest.mark.parametrize("case", slow_but_for(QUICK_CASES, CASES), ids=str)
def test_the_backward_needs_what_is_planned(case):
    family, mst = case
    terms, measured = planned_and_measured(family, FAMILIES[family], **mst)
    # Small things, such as rotary embeddings, are left out. GPT-NeoX, whose MLP stands beside its attention, has no
    # residual between them, which is counted; chunks of experts are planned for the worst routing.
    assert 0.9 <= measured / sum(terms.values()) <= 1.1


@pytest.mark.parametrize("mst", slow_but_for(QUICK, KEPT), ids=str)
def test_each_layer_that_is_kept_needs_what_is_planned(mst):
    """What a layer more needs: the difference tells what is kept of all layers from what is there once."""
    (few, measured), (many, measured_more) = (
        planned_and_measured("Llama", {"num_hidden_layers": layers}, **mst) for layers in (2, 6)
    )
    planned = sum(many.values()) - sum(few.values())
    assert planned >= many["gradients"] - few["gradients"] > 0
    # Without a tensor of hidden size for each layer the difference would be off by a tenth at least.
    assert measured_more - measured == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("keep_mlp", slow_but_for([True], [False, True]))
@pytest.mark.parametrize("chunks", slow_but_for([4], [1, 4]))
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {"intermediate_size": 2048, "num_key_value_heads": 4}),
        ("GPTNeoX", {"intermediate_size": 2048, "num_key_value_heads": None}),
        # Both experts get every token: the longest chunks there can be.
        ("Mixtral", {"intermediate_size": 1024, "num_local_experts": 2, "num_experts_per_tok": 2}),
        ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 2048}),
    ],
)
def test_a_wide_mlp_needs_what_is_planned(family, changes, chunks, keep_mlp):
    # In fp32: the CPU has no products of 16-bit matrices with an fp32 result, and copies its operands.
    terms, measured = planned_and_measured(family, changes, dtype="fp32", chunks=chunks, keep_mlp=keep_mlp)
    of_mlp = sum(count for name, count in terms.items() if name.startswith(("mlp_chunk", "kept_gate_up")))
    assert of_mlp > 0.2 * sum(terms.values())
    assert 0.9 <= measured / sum(terms.values()) <= 1.1
