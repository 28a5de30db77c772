"""The terms of what layers keep, of attention and of norms."""

import math

import pytest
from planned import GEMMA2, GPT_NEOX, HIDDEN, LAYERS, MODEL, SIZES, VOCAB, WIDE, bytes_of, plan_of, terms_of, wide_llama
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

# Attention of one narrow head, and no MLP worth the name.
NORMS_ONLY = LlamaConfig(
    **SIZES | {"intermediate_size": 8, "num_attention_heads": 1}, head_dim=2, num_key_value_heads=1
)
QWEN3 = Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)


LAYER_INPUT = 4000 * HIDDEN * 2
RECOMPUTE_ONLY = {
    "recompute": True,
    "keep_attention": False,
    "offload_activations": False,
    "attention": "sdpa",
    "keep_mlp": False,
}


def test_recompute_keeps_layer_inputs_only():
    kept = bytes_of(plan_of(mst=RECOMPUTE_ONLY), "loss")
    assert kept["layer_inputs"] == LAYERS * LAYER_INPUT
    assert not [name for name in kept if name.startswith("kept_") or name.endswith("_in_flight")]
    all_kept = bytes_of(plan_of(mst={"recompute": False}), "loss")
    for name in ("layer_inputs", "attention_input", "attention_output", "residual", "mlp_input"):
        assert all_kept[name] == LAYERS * LAYER_INPUT
    # query, key and value: 8 + 2 + 2 heads of 8.
    assert all_kept["query_key_value"] == LAYERS * 4000 * 96 * 2
    assert all_kept["log_sum_exp"] == LAYERS * 4000 * 8 * 4


@pytest.mark.parametrize("phase", ["forward", "loss", "backward"])
def test_attention_is_kept_as_its_output_and_log_sum_exp(phase):
    kept = bytes_of(plan_of(mst=RECOMPUTE_ONLY | {"keep_attention": True}), phase)
    assert kept["layer_inputs"] == kept["kept_attention"] == LAYERS * LAYER_INPUT
    assert kept["kept_log_sum_exp"] == LAYERS * 4000 * 8 * 4
    # A rank keeps the output of its shard, but the log-sum-exp of its heads: 2 of 8, of all tokens.
    sp = bytes_of(plan_of(mst=RECOMPUTE_ONLY | {"keep_attention": True}, sp_size=4), phase)
    assert sp["kept_attention"] == LAYERS * LAYER_INPUT / 4
    assert sp["kept_log_sum_exp"] == LAYERS * 4000 * 2 * 4


def test_what_is_kept_is_not_computed_again():
    kept = bytes_of(plan_of(mst=RECOMPUTE_ONLY | {"keep_attention": True, "mlp_chunks": 100}), "backward")
    again = bytes_of(plan_of(mst=RECOMPUTE_ONLY | {"mlp_chunks": 100}), "backward")
    assert {"attention_output", "log_sum_exp"} <= set(again) - set(kept)


@pytest.mark.parametrize("keep_attention", [False, True])
def test_offloading_leaves_two_layers_on_the_device(keep_attention):
    mst = {"recompute": True, "keep_attention": keep_attention, "offload_activations": True}
    plan = plan_of(mst=mst)
    pieces = {"layer_inputs": (LAYER_INPUT, 2**19)}  # 512,000 bytes in a piece of 524,288
    if keep_attention:
        pieces |= {"kept_attention": (LAYER_INPUT, 2**19), "kept_log_sum_exp": (4000 * 8 * 4, 2**17)}
    for phase in ("forward", "loss", "backward"):
        terms = terms_of(plan, phase)
        for name, (size, piece) in pieces.items():
            assert (terms[f"{name}_in_flight"].bytes, terms[f"{name}_in_flight"].place) == (2 * size, "device")
            on_host = terms[f"{name}_on_host"], terms[f"{name}_on_host_rounding"]
            assert [(term.bytes, term.place) for term in on_host] == [
                (LAYERS * size, "host"),
                (LAYERS * (piece - size), "host"),
            ]
            assert name not in terms
    # The store has its slabs for good: all pieces are of one.
    (optimizer_step,) = (phase for phase in plan.phases if phase.name == "optimizer_step")
    assert optimizer_step.host_bytes == plan.host_bytes == 2**25


def test_offloaded_no_activation_on_the_device_grows_with_the_layers():
    mst = {"recompute": True, "keep_attention": True, "offload_activations": True, "mlp_chunks": 4, "loss_chunks": 4}
    states = {"parameters", "gradients", "master_parameters", "optimizer_moments", "gathered_parameters"}
    activations = []
    for layers in (4, 40):
        plan = plan_of(model=LlamaConfig(**MODEL.to_dict() | {"num_hidden_layers": layers}), mst=mst)
        terms = terms_of(plan, "backward")
        activations.append(
            {name: term.bytes for name, term in terms.items() if term.place == "device" and name not in states}
        )
    assert activations[0] == activations[1]


def test_a_window_makes_attention_too_cheap_to_keep():
    mst = RECOMPUTE_ONLY | {"keep_attention": True}
    model = Gemma2Config(**GEMMA2.to_dict() | {"sliding_window": 3999})
    kept = bytes_of(plan_of(model=model, mst=mst), "loss")
    assert len(GEMMA2.layer_types) == LAYERS
    full = GEMMA2.layer_types.count("full_attention")
    assert 0 < full < LAYERS
    assert kept["kept_attention"] == full * LAYER_INPUT


def test_a_window_that_hides_nothing_is_none():
    without, idle, window = (
        plan_of(model=MistralConfig(**SIZES, sliding_window=size), mst=RECOMPUTE_ONLY | {"keep_attention": True})
        for size in (None, 4000, 3999)
    )
    assert idle.as_dict() == without.as_dict() != window.as_dict()


def attention_backward(**settings):
    """The terms of attention's backward: of one head as wide as many, so that nothing else makes the peak."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 100}
    sizes["head_dim"] = settings.pop("head_dim", 128)
    model = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=settings.pop("num_key_value_heads", 4))
    mst = {"mlp_chunks": 16, "loss_chunks": 16} | settings.pop("mst", {})
    return bytes_of(plan_of(model=model, mst=mst, **settings), "backward")


def test_attention_works_on_the_whole_sequence_with_a_part_of_the_heads():
    no_sp = attention_backward()
    assert not [name for name in no_sp if name.startswith(("gathered_q", "gathered_o", "all_to_all"))]
    # The local tensors: queries and output of 8 heads, keys and values of 4.
    assert no_sp["query_key_value"] == 4000 * (8 + 4 + 4) * 128 * 2
    assert no_sp["attention_gradients"] == 4000 * (8 + 4 + 4 + 8) * 128 * 2
    sp = attention_backward(sp_size=2, mst={"head_groups": 1})
    assert sp["query_key_value"] == no_sp["query_key_value"] / 2
    # Of all tokens and half of the heads, when the kernel runs.
    assert sp["gathered_query_key_value"] == sp["gathered_gradients"] == 4000 * (4 + 2 + 2) * 128 * 2
    assert sp["gathered_output_and_gradient"] == 2 * 4000 * 4 * 128 * 2
    # Without a workspace of the kernel: when the gradients leave through flat buffers.
    exchange = attention_backward(sp_size=2, dtype="fp32", num_key_value_heads=8, mst={"head_groups": 1})
    assert exchange["all_to_all_buffers"] == 2 * exchange["gathered_gradients"] == 2 * 4000 * (4 + 4 + 4) * 128 * 4
    # Fewer key/value heads than ranks: each rank has one of its own.
    few = attention_backward(sp_size=4, num_key_value_heads=2, mst={"head_groups": 1})
    assert few["gathered_query_key_value"] == 4000 * (2 + 1 + 1) * 128 * 2


def test_the_kernels_backward_has_a_workspace():
    """Flash attention's, in bytes by hand; its rows are multiples of 128 and its columns of 32."""
    grouped = attention_backward()
    assert grouped["kernel_query_gradient"] == 4096 * 8 * 128 * 4
    assert grouped["kernel_key_value_gradients"] == 2 * 4000 * 8 * 128 * 2
    assert "kernel_key_value_gradients" not in attention_backward(num_key_value_heads=8)
    assert attention_backward(head_dim=72)["kernel_query_gradient"] == 4096 * 8 * 96 * 4
    assert not [name for name in attention_backward(dtype="fp32") if name.startswith("kernel")]


def test_one_group_of_heads_is_gathered_at_a_time():
    one, two = (attention_backward(sp_size=2, mst={"head_groups": groups}) for groups in (1, 2))
    for name in ("gathered_query_key_value", "gathered_output_and_gradient", "kernel_query_gradient"):
        assert two[name] == one[name] / 2
    for name in ("query_key_value", "attention_gradients"):
        assert two[name] == one[name]


def test_keys_and_values_are_repeated_where_the_kernel_does_not_group_them():
    repeated = attention_backward(dtype="fp32")["repeated_key_value"]
    assert repeated == 4 * 4000 * 8 * 128 * 4  # and their gradients
    assert "repeated_key_value" not in attention_backward(dtype="fp32", num_key_value_heads=8)
    for attention in ("sdpa", "flash_attention_2"):
        assert plan_of(mst={"attention": attention}).settings.attention == attention
        assert "repeated_key_value" not in attention_backward(mst={"attention": attention})
    # 8 query heads over 3 ranks: the second rank's range of heads begins inside a group, and each head gets a copy.
    uneven = attention_backward(world_size=3, sp_size=3, seq_len=3999)
    assert uneven["gathered_gradients"] == 3999 * (3 + 3 + 3) * 128 * 2


def test_norms_keep_their_inputs_and_work_in_chunks():
    def hidden(**settings):
        # Scores in plain torch, as of Gemma 2, would be more than an MLP.
        mst = RECOMPUTE_ONLY | {"mlp_chunks": 1, "attention": "flash_attention_2"}
        terms = bytes_of(plan_of(mst=mst, **settings), "backward")
        names = ("attention_input", "residual", "mlp_input", "post_norm_inputs", "query_key_norm_inputs")
        return {name: terms[name] for name in names if name in terms}

    llama = hidden(model=wide_llama())
    assert llama == dict.fromkeys(("attention_input", "residual", "mlp_input"), LAYER_INPUT)
    assert hidden(model=QWEN3) == llama | {"query_key_norm_inputs": 4000 * (8 + 2) * 8 * 2}
    gemma2 = Gemma2Config(**GEMMA2.to_dict() | {"intermediate_size": WIDE})
    assert hidden(model=gemma2) == llama | {"post_norm_inputs": 2 * LAYER_INPUT}
    # Short: the whole in one chunk, in the backward four tensors in fp32. Long: those of a chunk, however long.
    short = bytes_of(plan_of(model=NORMS_ONLY, mst={"mlp_chunks": 15}), "backward")
    assert short["norm_working_set"] == 4 * 4000 * HIDDEN * 4
    in_fp32 = bytes_of(plan_of(model=NORMS_ONLY, mst={"mlp_chunks": 15}, dtype="fp32"), "backward")
    assert in_fp32["norm_working_set"] == 2 * 4000 * HIDDEN * 4  # two of them are what is given
    for phase, tensors in (("forward", 3), ("backward", 4)):
        long = (
            bytes_of(plan_of(model=NORMS_ONLY, mst={"mlp_chunks": 1000}, seq_len=length), phase)
            for length in (2**18, 2**19)
        )
        assert [terms["norm_working_set"] for terms in long] == [tensors * 2**24 * 4] * 2


def test_softcaps_have_a_derivative_of_the_logits_and_scores_in_plain_torch():
    loss = bytes_of(plan_of(model=GEMMA2, mst={"loss_chunks": 7}), "loss")
    assert loss["loss_softcap_derivative"] == loss["loss_logits"] == 4 * math.ceil(4000 / 7) * VOCAB
    scores = {
        (length, sp_size): bytes_of(
            plan_of(model=GEMMA2, mst={"attention": "sdpa", "mlp_chunks": 64}, seq_len=length, sp_size=sp_size),
            "backward",
        )["attention_scores"]
        for length, sp_size in ((4096, 1), (2**20, 1), (2**20, 4))
    }
    # 2^25 scores of all heads at a time, but 64 queries at least.
    each = 3 * 4 + 2
    assert scores == {(4096, 1): each * 2**25, (2**20, 1): each * 8 * 2**26, (2**20, 4): each * 2 * 2**26}
    flash = plan_of(model=GEMMA2, mst={"attention": "flash_attention_2"})
    assert "attention_scores" not in terms_of(flash, "backward")


def test_a_fused_projection_is_kept_by_the_values_that_are_a_part_of_it():
    fused = bytes_of(plan_of(model=GPT_NEOX), "backward")["fused_query_key"]
    assert fused == 4000 * (8 + 8) * 8 * 2
    assert bytes_of(plan_of(model=GPT_NEOX, sp_size=4), "backward")["fused_query_key"] == fused / 4
