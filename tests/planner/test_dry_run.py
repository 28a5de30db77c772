"""The formulas against a dry run: the real, patched model on fake tensors, at real sizes."""

import math
import random
from contextlib import nullcontext

import pytest
import torch
from tiers import slow_but_for
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    ArceeConfig,
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.activations import ACT2FN

import mst_ds.memory.dry_run
import mst_ds.memory.mixers
from mst_ds.adapters import model_on_meta
from mst_ds.memory.dry_run import as_on_an_accelerator, dry_run, planned_activations
from mst_ds.memory.live import LiveMemory
from mst_ds.memory.mixers import with_mixers
from mst_ds.minisequence import chunked_mlp
from mst_ds.model_shape import ModelShape, load_config_of_shape
from mst_ds.planner import make_plan
from mst_ds.planner.mlp import TENSORS_OF_ACTIVATION
from mst_ds.structure.trained import trained_shape

# Seconds each, some of them ten and more. 60 held when the formulas were written.
NUM_CASES = 9
QUICK_CASES = (3, 4, 7, 8)
TOLERANCE = 0.02
# Sizes at which nothing small, such as a position or a sum over tokens, is 1% of anything.
FAMILIES = (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, GemmaConfig)


def plan_and_peaks(config, shape=None, *, dtype="bf16", micro_batch_size=1, seq_len, sp_size=1, **mst):
    ds_config = {
        dtype: {"enabled": True},
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "mst": {"attention": "sdpa"} | mst,
    }
    world_size = max(8, sp_size)
    plan = make_plan(
        shape or config, ds_config, world_size=world_size, seq_len=seq_len, sp_size=sp_size, device_memory=2**60
    )
    return planned_activations(plan), dry_run(config, plan)


def random_case(seed):
    """A decoder of full attention."""
    draw = random.Random(seed)
    head_dim, key_value_heads = draw.choice((64, 128)), draw.choice((2, 4, 8))
    heads = key_value_heads * draw.choice((1, 2, 4))
    hidden = draw.choice((1, 1, 2)) * heads * head_dim
    config = draw.choice(FAMILIES)(
        hidden_size=hidden,
        intermediate_size=draw.choice((2, 3, 4)) * hidden + 64 * draw.randrange(8),
        num_hidden_layers=draw.randint(1, 4),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocab_size=draw.randrange(16_000, 160_000, 1000),
        sliding_window=None,
        tie_word_embeddings=draw.choice((False, True)),
    )
    recompute = draw.choice((False, True, True))
    names = ("keep_mlp", "keep_attention", "offload_activations") if recompute else ("keep_mlp",)
    mst = {"recompute": recompute} | {name: draw.choice((False, True)) for name in names}
    mst["layer_chunks"] = draw.choice((1, 2, 5)) if recompute else 1
    sp_size = draw.choice([size for size in (1, 1, 2, 4) if size <= heads])
    if sp_size > 1 and key_value_heads % sp_size == 0:
        mst["head_groups"] = draw.choice([n for n in (1, 2, 4) if key_value_heads // sp_size % n == 0])
    settings = {
        # In fp32 the plan is for CUDA's kernels, which have a copy of a key/value head for each query head.
        "dtype": draw.choice(("bf16", "fp16") if heads > key_value_heads else ("bf16", "fp16", "fp32")),
        "micro_batch_size": draw.choice((1, 1, 2)),
        "seq_len": draw.randrange(8192, 65_536, 1024),
        "sp_size": sp_size,
        "mlp_chunks": draw.choice(("auto", 1, 3, 8, 16)),
        "loss_chunks": draw.choice(("auto", 4, 8, 32)),
    }
    return config, settings | mst


@pytest.mark.parametrize("seed", slow_but_for(QUICK_CASES, range(NUM_CASES)))
def test_formulas_give_the_peak_of_the_dry_run(seed):
    config, settings = random_case(seed)
    planned, measured = plan_and_peaks(config, **settings)
    assert max(planned.values()) == pytest.approx(max(measured.values()), rel=TOLERANCE), (planned, measured)


NOTHING_TWICE, OFF = ({"recompute": False, "keep_mlp": keeps} for keeps in (True, False))
AGAIN = {"recompute": True, "keep_attention": False, "keep_mlp": False}
KEPT, OFFLOADED, KEPT_MLP, OFFLOADED_MLP = (
    {"keep_attention": True, "offload_activations": offload, "keep_mlp": keep_mlp}
    for keep_mlp in (False, True)
    for offload in (False, True)
)
ALL_KEPT = (NOTHING_TWICE, OFF, KEPT, AGAIN, OFFLOADED, KEPT_MLP, OFFLOADED_MLP)
AGAIN_OFFLOADED = AGAIN | {"offload_activations": True}
STREAMED = ((8, KEPT), (8, OFFLOADED), (8, AGAIN_OFFLOADED), (4, KEPT_MLP), (4, OFFLOADED_MLP))
LLAMA_8B_CASES = (
    *((16_384, 1, mst) for mst in ALL_KEPT),
    # A rank has as many tokens, so that its MLP is the same.
    *((131_072, 8, mst) for mst in (OFF, KEPT, AGAIN, OFFLOADED)),
    *((131_072, 8, {"layer_chunks": chunks} | mst) for chunks, mst in STREAMED),
    *((32_768, 1, {"layer_chunks": 8} | mst) for mst in (KEPT, AGAIN_OFFLOADED)),
    # So long that weights are little of it. Of 32 ranks four share a key/value head.
    (1_048_576, 8, {"layer_chunks": 3} | AGAIN_OFFLOADED),
    (1_048_576, 32, {"layer_chunks": 2} | AGAIN_OFFLOADED),
)
QUICK_LLAMA_8B_CASES = (
    (16_384, 1, OFF),
    (16_384, 1, OFFLOADED_MLP),
    (131_072, 8, KEPT),
    (131_072, 8, {"layer_chunks": 8} | OFFLOADED),
)


@pytest.mark.parametrize("case", slow_but_for(QUICK_LLAMA_8B_CASES, LLAMA_8B_CASES), ids=str)
def test_formulas_give_each_phase_of_llama_8b(case):
    """Of four of its layers, of which all are alike."""
    seq_len, sp_size, mst = case
    config = load_config_of_shape("meta-llama/Llama-3.1-8B")
    config.num_hidden_layers = 4
    planned, measured = plan_and_peaks(config, seq_len=seq_len, sp_size=sp_size, **mst)
    for phase, count in measured.items():
        # Below the peak of all, attention that is not kept is planned with an input and an output that come and go.
        is_rough = count < max(measured.values()) and not mst.get("keep_attention", True)
        assert (1 - TOLERANCE) * count <= planned[phase] <= (1 + TOLERANCE + 0.04 * is_rough) * count, phase


@pytest.mark.parametrize("seq_len", slow_but_for([2060], [2048, 2060]))
@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
@pytest.mark.parametrize("mst", [OFF, AGAIN])
def test_the_largest_blocks_of_attention_give_the_peak_of_all(monkeypatch, seq_len, layer_type, mst):
    """Of scores with a softcap, where the last block has as many queries as the others, or fewer."""
    config = Gemma2Config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=100,
        sliding_window=512,
        layer_types=[layer_type],
    )
    of_largest = plan_and_peaks(config, seq_len=seq_len, **mst)[1]
    monkeypatch.setattr(mst_ds.memory.dry_run, "only_the_largest_blocks", nullcontext)
    assert of_largest == plan_and_peaks(config, seq_len=seq_len, **mst)[1]


SIZES = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "head_dim": 128,
    "vocab_size": 16_000,
    "num_hidden_layers": 2,
}
LAYER_TYPES = ["full_attention", "sliding_attention"]
GROUPED, EACH = {"num_key_value_heads": 4}, {"num_key_value_heads": 16}
WIDE = {"intermediate_size": 7168}
MISTRAL, MIXED = {"sliding_window": 4096}, {"sliding_window": 2048}
LAST_FEW = {"use_sliding_window": True, "max_window_layers": 1}
WINDOW_CASES = (
    *((MistralConfig, MISTRAL | heads, {"sp_size": n}) for heads in (GROUPED, EACH) for n in (1, 2)),
    *((MistralConfig, MISTRAL | GROUPED | WIDE, {"sp_size": n} | OFF) for n in (1, 2)),
    # Several chunks, which hold the keys of a window that ends in the second one before theirs.
    *((MistralConfig, MISTRAL | GROUPED | sizes, {"layer_chunks": 14}) for sizes in ({}, WIDE)),
    # Rows of a length that blocks do not divide.
    (MistralConfig, MISTRAL | GROUPED, {"seq_len": 16_884, "micro_batch_size": 2}),
    (MistralConfig, MISTRAL | EACH, {"dtype": "fp32"}),
    # The last layer has a window, then not; the others the other way round.
    *((Qwen2Config, MIXED | GROUPED | LAST_FEW | sizes, kept) for sizes, kept in (({}, KEPT), (WIDE, OFF))),
    (Gemma3TextConfig, MIXED | GROUPED | {"layer_types": LAYER_TYPES}, {"sp_size": 2} | OFFLOADED),
    (Gemma3TextConfig, MIXED | GROUPED | {"layer_types": LAYER_TYPES[::-1]}, KEPT),
    # A softcap has no kernel at all.
    (Gemma2Config, MIXED | GROUPED, {"seq_len": 16_384}),
)
QUICK_WINDOW_CASES = (WINDOW_CASES[1], WINDOW_CASES[8], WINDOW_CASES[-3])  # on shards, a whole row, both


@pytest.mark.parametrize("case", slow_but_for(QUICK_WINDOW_CASES, WINDOW_CASES))
def test_formulas_give_the_backward_of_layers_with_a_window(case):
    family, sizes, settings = case
    # MLPs are so small that attention makes the backward's peak, where they are not `WIDE`.
    config = family(**{**SIZES, "intermediate_size": 1024, **sizes})
    settings = ({} if settings.keys() & AGAIN.keys() else AGAIN) | settings
    planned, measured = plan_and_peaks(config, **{"seq_len": 32_768, "loss_chunks": 64} | settings)
    assert planned["backward"] == pytest.approx(measured["backward"], rel=TOLERANCE)
    assert max(planned.values()) == pytest.approx(max(measured.values()), rel=TOLERANCE), (planned, measured)


def test_the_forward_puts_a_windows_output_together_of_its_parts():
    config = MistralConfig(**SIZES | MISTRAL | GROUPED | WIDE)
    planned, measured = plan_and_peaks(config, seq_len=32_768, **AGAIN)
    assert planned["forward"] == pytest.approx(measured["forward"], rel=TOLERANCE)


NARROW = {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
WIDE_MLP = {"intermediate_size": 8192}
GPT2 = {"n_inner": 8192, "n_positions": 16_384, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MLP_CASES = (
    # Without a gate, in one kernel and in several.
    (ArceeConfig, WIDE_MLP | {"num_key_value_heads": 8, "hidden_act": "silu"}),
    (ArceeConfig, WIDE_MLP | {"num_key_value_heads": 8}),
    (GPT2Config, GPT2),
    *((LlamaConfig, WIDE_MLP | {"hidden_act": name}) for name in ("silu", "gelu_new", "relu")),
)


# What is kept of an MLP, where it has no gate, a gate and one kernel, a gate and several.
KEPT_MLP_CASES = [(*MLP_CASES[index], mst) for index in (1, 3, 4) for mst in (OFF, KEPT_MLP)]
AGAIN_MLP_CASES = [(*case, AGAIN) for case in MLP_CASES]


@pytest.mark.parametrize("case", slow_but_for(AGAIN_MLP_CASES, AGAIN_MLP_CASES + KEPT_MLP_CASES), ids=str)
def test_formulas_give_mlps_of_any_activation(case):
    family, changes, mst = case
    config = family(**NARROW | changes, vocab_size=16_000)
    planned, measured = plan_and_peaks(config, seq_len=16_384, mlp_chunks=2, loss_chunks=64, **mst)
    assert planned["backward"] == pytest.approx(measured["backward"], rel=TOLERANCE)
    assert max(planned.values()) == planned["backward"]
    assert planned["forward"] == pytest.approx(measured["forward"], rel=TOLERANCE)


# Rotated in part: where the projections' outputs stay, beside an MLP that reads the same norm; of one fused projection.
@pytest.mark.parametrize("family", [PhiConfig, GPTNeoXConfig])
def test_formulas_give_attention_that_is_rotated_in_part(family):
    config = family(**NARROW, intermediate_size=1024, vocab_size=16_000)
    planned, measured = plan_and_peaks(config, seq_len=16_384, mlp_chunks=8, loss_chunks=64, **KEPT)
    for phase in ("forward", "backward"):
        assert planned[phase] == pytest.approx(measured[phase], rel=TOLERANCE), phase


# Three of four layers have no attention.
MIXED = {"num_hidden_layers": 4, "num_key_value_heads": 2, "hidden_size": 1024, "num_attention_heads": 8}
MIXERS = {
    "qwen3_5_text": {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_num_value_heads": 16},
    "granitemoehybrid": {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "mamba_n_heads": 32,
        "mamba_d_state": 64,
        "shared_intermediate_size": 3072,
        "num_local_experts": 0,
    },
    "lfm2": {"layer_types": ["conv"] * 3 + ["full_attention"]},
    "falcon_h1": {"mamba_n_heads": 32, "mamba_d_head": 64, "mamba_d_ssm": 2048},
}


@pytest.mark.parametrize("model_type", slow_but_for(["granitemoehybrid", "lfm2"], MIXERS))
def test_formulas_give_layers_that_are_not_attention(model_type):
    config = AutoConfig.for_model(model_type, **MIXED | MIXERS[model_type], vocab_size=16_000)
    on_meta = model_on_meta(config, None)[0]
    shape = with_mixers(trained_shape(ModelShape.from_config(config), on_meta), on_meta, torch.bfloat16)
    for sp_size, recompute, layer_chunks in ((2, True, 1), (1, False, 1), (1, True, 4)):
        # The delta rule is a loop in Python.
        tokens = 1024 if model_type == "qwen3_5_text" else 4096
        settings = {"seq_len": tokens * sp_size, "sp_size": sp_size, "mlp_chunks": 8, "loss_chunks": 64}
        settings |= {"recompute": recompute, "layer_chunks": layer_chunks}
        planned, measured = plan_and_peaks(config, shape, **settings)
        assert max(planned.values()) == pytest.approx(max(measured.values()), rel=0.05), (planned, measured)


def test_each_kind_of_mixer_is_measured_once(monkeypatch):
    """A real model has dozens of layers of a kind."""
    measured = []
    monkeypatch.setattr(mst_ds.memory.mixers, "_measured", lambda mixer, *_: measured.append(mixer))
    on_meta = model_on_meta(AutoConfig.for_model("lfm2", **MIXED | MIXERS["lfm2"]), None)[0]
    with_mixers(ModelShape.from_config(on_meta.config), on_meta, torch.bfloat16)
    assert len(measured) == 1


def peaks_of_mlp(activation):
    """Of a gated MLP's forward and backward in 16 bits, in tensors of a chunk, to which hidden states add little."""
    tokens, intermediate, chunks = 4096, 2**16, 4
    with FakeTensorMode(), as_on_an_accelerator():
        x, gate, up, down = (
            torch.empty(sizes, dtype=torch.bfloat16, requires_grad=True)
            for sizes in ((tokens, 8), (intermediate, 8), (intermediate, 8), (8, intermediate))
        )
        with LiveMemory() as memory:
            output = chunked_mlp(x, gate, up, down, chunks=chunks, activation=activation)
            forward = memory.peak
            memory.reset_peak()
            output.sum().backward()
    return [count / (2 * tokens // chunks * intermediate) for count in (forward, memory.peak)]


@pytest.mark.parametrize("name", ACT2FN)
def test_every_activation_makes_the_tensors_that_are_planned(name):
    activation = ACT2FN[name]
    if name == "linear":
        pytest.skip("returns what it is given, and makes nothing")
    if [*activation.parameters(), *activation.buffers()]:
        pytest.skip("an MLP with parameters in its activation is not chunked by this operator")
    forward, backward = peaks_of_mlp(activation)
    # Beside the gate, and beside gate, up and what is the product and then its gradient. A mask is half a tensor.
    made = math.ceil(forward - 1 - 0.1), math.ceil(backward - 3 - 0.1)
    assert made == TENSORS_OF_ACTIVATION.get(name, (1, 1))


EXPERTS = MixtralConfig(**NARROW | {"intermediate_size": 2048}, num_key_value_heads=8, vocab_size=16_000)


def test_all_tokens_may_go_to_the_same_experts():
    """Of which a plan has the longest chunks, with tensors that only several experts at a time need."""
    planned, measured = plan_and_peaks(EXPERTS, seq_len=16_384, mlp_chunks=2, loss_chunks=64, **KEPT)
    assert max(measured.values()) == measured["backward"]
    for phase, count in measured.items():
        assert 0.98 * count <= planned[phase] <= 1.3 * count, phase


def test_what_depends_on_values_has_no_dry_run(monkeypatch):
    monkeypatch.setattr(mst_ds.memory.dry_run, "tokens_at_the_same_experts", nullcontext)
    with pytest.raises(ValueError, match="MixtralForCausalLM decides by values what it computes, and has no dry run"):
        plan_and_peaks(EXPERTS, seq_len=1024)


def test_formulas_give_each_phase_with_an_indexer():
    """Of layers with an indexer and one that takes its picks, which lie on the host and on the device."""
    config = AutoConfig.for_model(
        "glm_moe_dsa",
        hidden_size=2048,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32_000,
        mlp_layer_types=["dense"] * 2,
        q_lora_rank=512,
        kv_lora_rank=256,
        index_topk=1024,
        indexer_types=["full", "shared"],
    )
    planned, measured = plan_and_peaks(config, seq_len=32_768, sp_size=4, **OFFLOADED)
    for phase, count in measured.items():
        # Projections by way of a latent are planned as if they were plain ones.
        assert planned[phase] == pytest.approx(count, rel=0.05), phase
