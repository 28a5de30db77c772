"""The terms: each is what its formula says, and stands where and when it should."""

import math

import pytest
import torch
from planned import (
    EXPERTS,
    GEMMA2,
    GPT_NEOX,
    HIDDEN,
    INTERMEDIATE,
    LAYER,
    LAYERS,
    MODEL,
    PARAMETERS,
    VOCAB,
    WIDE,
    WIDE_NEOX,
    bytes_of,
    experts_with,
    plan_of,
    terms_of,
    wide_llama,
)
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("model", [MODEL, EXPERTS, GEMMA2, GPT_NEOX], ids=lambda config: config.model_type)
def test_the_phases_of_a_plan_and_its_peak(model):
    """What holds of the terms of any plan is in test_random_plans."""
    plan = plan_of(3, model=model, sp_size=4)
    assert [phase.name for phase in plan.phases] == [
        "initialisation",
        "forward",
        "loss",
        "backward",
        "optimizer_step",
    ]
    assert all(phase.terms for phase in plan.phases)
    assert plan.peak_bytes == max(phase.device_bytes for phase in plan.phases) == plan.peak_phase.device_bytes


NORMS = (2 * LAYERS + 1) * HIDDEN
OF_WEIGHTS = 2 * (81_920 + 3 * HIDDEN) / PARAMETERS


# Bytes of one parameter's states by the ZeRO paper (arXiv 1910.02054, table 1: 2 + 2 + 12), over 4 ranks.
@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "optimizer"),
    # At stage 2, and in the step of stage 1, the gradients are those of whole weights: of layers 1 and 2 but for the
    # last weight, of three norms.
    [(0, 2, 2, 12), (1, 2, OF_WEIGHTS, 3), (2, 2, OF_WEIGHTS, 3), (3, 0.5, 0.5, 3)],
    ids=["0", "1", "2", "3"],
)
def test_states_are_sharded_by_stage(stage, parameters, gradients, optimizer):
    plan = plan_of(stage)
    terms = bytes_of(plan, "backward") | bytes_of(plan, "optimizer_step")
    assert terms["parameters"] == parameters * PARAMETERS
    assert terms["gradients"] == gradients * PARAMETERS
    assert terms["master_parameters"] + terms["optimizer_moments"] == optimizer * PARAMETERS
    assert ("gathered_parameters" in terms) == (stage == 3)
    assert ("reduce_bucket" in terms) == (stage > 0)


def test_shards_are_rounded_up():
    terms = bytes_of(plan_of(3, world_size=7), "forward")
    assert terms["parameters"] == 2 * math.ceil(PARAMETERS / 7)
    assert terms["master_parameters"] == 4 * math.ceil(PARAMETERS / 7)


def test_sequence_parallel_ranks_share_the_states_like_all_others():
    for sp_size in (1, 2, 4):
        assert bytes_of(plan_of(3, sp_size=sp_size), "backward")["optimizer_moments"] == 2 * PARAMETERS


@pytest.mark.parametrize(("name", "moments"), [("AdamW", 2), ("Lion", 1), ("SGD", 0)])
def test_moments_are_those_of_the_jsons_optimizer(name, moments):
    plan = plan_of(3, optimizer={"type": name})
    for phase in plan.phases:
        terms = bytes_of(plan, phase.name)
        assert terms.get("optimizer_moments", 0) == moments * PARAMETERS
        assert terms["master_parameters"] == PARAMETERS
    on_host = {"device": "cpu", "pin_memory": False}
    offloaded = plan_of(3, optimizer={"type": name}, zero={"offload_optimizer": on_host})
    assert offloaded.host_bytes - bytes_of(offloaded, "backward").get("optimizer_moments", 0) == 2.5 * PARAMETERS


def test_plain_fp32_has_no_master_copy():
    assert "master_parameters" not in terms_of(plan_of(0, dtype="fp32"), "backward")
    assert bytes_of(plan_of(3, dtype="fp32"), "backward")["master_parameters"] == PARAMETERS


def test_offloading_moves_states_off_the_device():
    on_host = {"device": "cpu", "pin_memory": False}
    on_device, offloaded = plan_of(3), plan_of(3, zero={"offload_optimizer": on_host, "offload_param": on_host})
    states = ("parameters", "master_parameters", "optimizer_moments", "gradients")
    moved = sum(bytes_of(on_device, "backward")[name] for name in states)
    terms = terms_of(offloaded, "backward")
    assert {terms[name].place for name in states} == {"host"}
    assert terms["gathered_parameters"].place == terms["reduce_bucket"].place == "device"
    before, after = (next(p for p in plan.phases if p.name == "backward") for plan in (on_device, offloaded))
    added = terms["fp32_gradient"].bytes + after.kind_bytes("reserve", "host")
    assert before.device_bytes - after.device_bytes == moved == after.host_bytes - added
    assert on_device.host_bytes == 0
    assert offloaded.host_bytes == max(phase.host_bytes for phase in offloaded.phases) > moved


def test_gradients_stand_before_the_backward_only_where_they_must():
    assert "gradients" not in terms_of(plan_of(2), "forward")
    assert "gradients" in terms_of(plan_of(2, gradient_accumulation_steps=2), "forward")
    assert "gradients" in terms_of(plan_of(3), "initialisation")


def gathered(phase, mst=None, **zero):
    plan = plan_of(3, mst={"recompute": True} | (mst or {}), zero={"stage3_prefetch_bucket_size": 0} | zero)
    return bytes_of(plan, phase)["gathered_parameters"] // 2


def test_gathered_parameters_stay_until_they_are_used_again():
    head = VOCAB * HIDDEN
    # Between the last layer's forward and its backward is the head, twice; between another's also the layers after it,
    # in the forward and in the backward.
    for distance, kept in [
        (0, 0),
        (2 * head, 0),
        (2 * head + 1, 1),
        (2 * head + 2 * LAYER, 1),
        (2 * head + 2 * LAYER + 1, 2),
    ]:
        assert gathered("forward", stage3_max_reuse_distance=distance) == max(1, kept) * LAYER
        assert gathered("loss", stage3_max_reuse_distance=distance) == kept * LAYER + head
        assert gathered("backward", stage3_max_reuse_distance=distance) == max(1, kept) * LAYER
    # Without recompute they are met as often.
    kept = gathered("loss", {"recompute": False}, stage3_max_reuse_distance=2 * head + 2 * LAYER + 1)
    assert kept == 2 * LAYER + head
    assert gathered("loss", stage3_max_reuse_distance=10**9) == PARAMETERS - HIDDEN  # all but the final norm


NORMS, KEY_VALUE = (2 * LAYERS + 1) * HIDDEN, LAYERS * 2 * HIDDEN * HIDDEN // 4


@pytest.mark.parametrize(
    ("threshold", "persistent"),
    [
        (HIDDEN - 1, 0),
        (HIDDEN, NORMS),
        (HIDDEN * HIDDEN // 4, NORMS + KEY_VALUE),
        (HIDDEN * INTERMEDIATE, PARAMETERS - 2 * VOCAB * HIDDEN),
        (VOCAB * HIDDEN, PARAMETERS),
    ],
)
def test_small_parameters_stay_whole_until_the_step(threshold, persistent):
    limits = {"stage3_param_persistence_threshold": threshold, "stage3_max_reuse_distance": 0}
    plan = plan_of(3, zero=limits | {"stage3_prefetch_bucket_size": 0, "offload_param": {"device": "cpu"}})
    in_layer = (persistent - HIDDEN) // LAYERS if HIDDEN <= threshold < VOCAB * HIDDEN else 0
    gathered = dict.fromkeys(("forward", "backward"), LAYER - in_layer) | {"loss": VOCAB * HIDDEN}
    for phase, live in gathered.items():
        terms = terms_of(plan, phase)
        of_persistent = terms.pop("persistent_parameters", None)
        assert (of_persistent.bytes if of_persistent else 0) == 2 * persistent
        assert not of_persistent or of_persistent.place == "device"
        # Nothing counts twice.
        left = min(live, PARAMETERS - persistent)
        assert (terms["gathered_parameters"].bytes if left else 0) == 2 * left
        assert ("gathered_parameters" in terms) == (left > 0)
        # The shard has its part of them too.
        assert terms["parameters"].bytes == PARAMETERS // 2
    for phase in ("initialisation", "optimizer_step"):
        assert "persistent_parameters" not in terms_of(plan, phase)


def test_the_models_threshold_bounds_what_persists():
    limits = {"stage3_param_persistence_threshold": 10**5, "stage3_model_persistence_threshold": 1000}
    assert bytes_of(plan_of(3, zero=limits), "loss")["gathered_parameters"] == 2 * (PARAMETERS - 1000)
    limits |= {"stage3_max_reuse_distance": 0}
    terms = bytes_of(plan_of(3, zero=limits), "forward")
    assert terms["persistent_parameters"] == 2 * 1000
    without = bytes_of(plan_of(3, zero={"stage3_max_reuse_distance": 0}), "forward")
    assert terms["gathered_parameters"] == without["gathered_parameters"]
    assert "persistent_parameters" not in terms_of(plan_of(2, zero=limits), "forward")


@pytest.mark.parametrize("model", [EXPERTS, GPT_NEOX], ids=lambda config: config.model_type)
def test_persistent_weights_are_those_of_the_model(model):
    """The oracle is the model itself, on the meta device; biases and a shared expert's gate are not in the shape."""
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(model)
    for threshold in (HIDDEN, HIDDEN * HIDDEN, 10**5):
        small = sum(
            parameter.numel()
            for name, parameter in weights.named_parameters()
            if parameter.numel() <= threshold and (parameter.dim() > 1 or "norm" in name)
        )
        terms = bytes_of(plan_of(3, model=model, zero={"stage3_param_persistence_threshold": threshold}), "loss")
        assert terms["persistent_parameters"] == pytest.approx(2 * small, abs=2 * LAYERS * HIDDEN)


def test_prefetched_parameters_are_gathered_within_the_live_limit():
    alone = gathered("backward", stage3_max_reuse_distance=0)
    limits = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 1000}
    assert gathered("backward", **limits) == alone + 1000
    assert gathered("backward", **limits, stage3_max_live_parameters=alone + 300) == alone + 300
    assert gathered("backward", **limits, stage3_max_live_parameters=0) == alone
    # After the last layer comes the head's weight, whole.
    assert gathered("forward", **limits) == alone + VOCAB * HIDDEN


def test_overlap_has_two_buckets_below_stage_3():
    buckets = [
        bytes_of(plan_of(stage, zero={"overlap_comm": overlap}), "backward")["reduce_bucket"]
        for stage, overlap in [(2, False), (2, True), (3, True)]
    ]
    assert buckets == [2000, 4000, 2000]


def test_optimizer_step_walks_sub_groups_at_stage_3():
    """A sub-group ends with a whole weight, and norms, which are not decayed, are in others."""

    def gradient(size):
        return bytes_of(plan_of(3, zero={"sub_group_size": size}), "optimizer_step")["fp32_gradient"]

    embedding, layer = VOCAB * HIDDEN, LAYER - 2 * HIDDEN
    assert gradient(10**9) == PARAMETERS - NORMS
    assert gradient(1000) == embedding
    assert gradient((embedding + layer) // 4) == (LAYERS - 1) * layer + embedding  # the other layers, with the head
    assert bytes_of(plan_of(2, zero={"sub_group_size": 1000}), "optimizer_step")["fp32_gradient"] == PARAMETERS


def test_gradients_in_16_bits_are_flat_before_they_are_in_fp32():
    """Of the matrices: norms, which are not decayed, are a group of their own that comes later."""
    matrices = PARAMETERS - NORMS
    for stage in (2, 3):
        terms = bytes_of(plan_of(stage), "optimizer_step")
        assert terms["flat_gradient"] == 2 * matrices // 4
    # At stage 1 the gradients of the other ranks' parameters, 2 bytes each, are more than 2 + 2 + 4 from 4 ranks on.
    assert "flat_gradient" not in bytes_of(plan_of(1, world_size=8), "optimizer_step")
    terms = bytes_of(plan_of(1, world_size=2), "optimizer_step")
    of_step = [terms[name] for name in ("gradients", "flat_gradient", "fp32_gradient")]
    # Whole weights, as at stage 2.
    own = bytes_of(plan_of(2, world_size=2), "optimizer_step")["gradients"]
    assert of_step == [own, 2 * matrices // 2, 4 * PARAMETERS // 2]
    assert bytes_of(plan_of(3, zero={"sub_group_size": 1000}), "optimizer_step")["flat_gradient"] == VOCAB * HIDDEN // 2
    # In fp32 the flat one is the copy, and on the host each weight's has its place.
    in_fp32 = {"data_types": {"grad_accum_dtype": "fp32"}}
    on_host = {"zero": {"offload_optimizer": {"device": "cpu"}}}
    for stage in (1, 2, 3):
        for other in (in_fp32, on_host, {"dtype": "fp32"}):
            assert "flat_gradient" not in bytes_of(plan_of(stage, world_size=2, **other), "optimizer_step")


def test_chunked_operators_have_the_terms_of_their_implementation():
    plan = plan_of(mst={"mlp_chunks": 3, "loss_chunks": 7, "recompute": True}, seq_len=4001, dtype="bf16")
    loss = bytes_of(plan, "loss")
    assert loss["head_gradient"] == 4 * VOCAB * HIDDEN
    assert loss["hidden_gradient"] == 2 * 4001 * HIDDEN
    assert loss["loss_logits"] == 4 * math.ceil(4001 / 7) * VOCAB
    assert loss["loss_logits_16bit"] == 2 * math.ceil(4001 / 7) * VOCAB
    assert "loss_logits_16bit" not in terms_of(plan_of(mst={"loss_chunks": 7}, dtype="fp32"), "loss")
    assert loss["final_norm_input"] == loss["final_norm_output"] == 2 * 4001 * HIDDEN
    assert loss["loss_hidden_states"] == 4 * math.ceil(4001 / 7) * HIDDEN
    unchunked = plan_of(mst={"mlp_chunks": 1, "keep_mlp": False}, model=wide_llama())
    backward, forward = bytes_of(unchunked, "backward"), bytes_of(unchunked, "forward")
    assert backward["mlp_chunk"] == 4 * 4000 * WIDE * 2
    assert backward["mlp_weight_gradients"] == 3 * HIDDEN * WIDE * 4
    assert backward["mlp_input_gradient"] == forward["mlp_output"] == 4000 * HIDDEN * 2
    assert forward["mlp_chunk"] == 2 * 4000 * WIDE * 2


@pytest.mark.parametrize(("model", "tensors"), [(MODEL, 2), (GPT_NEOX, 1)], ids=["gated", "plain"])
def test_kept_gate_and_up_stand_while_layers_do(model, tensors):
    kept = plan_of(model=model, mst={"recompute": False, "keep_mlp": True, "mlp_chunks": 1})
    of_layer = tensors * 4000 * INTERMEDIATE * 2
    for phase in ("forward", "loss", "backward"):
        assert bytes_of(kept, phase)["kept_gate_up"] == LAYERS * of_layer
    assert not [name for name in terms_of(kept, "optimizer_step") if name.startswith("kept")]
    assert bytes_of(kept, "backward")["mlp_chunk"] == (1 + tensors) * 4000 * INTERMEDIATE * 2
    again = plan_of(model=model, mst={"recompute": False, "keep_mlp": False})
    assert not [name for phase in again.phases for name in terms_of(again, phase.name) if name.startswith("kept")]


@pytest.mark.parametrize(("model", "tensors"), [(wide_llama(), 2), (WIDE_NEOX, 1)], ids=["gated", "plain"])
def test_gate_and_up_on_the_host_are_on_the_device_for_two_layers(model, tensors):
    kept = {"recompute": True, "keep_attention": True, "keep_mlp": True, "mlp_chunks": 1}
    of_tensor = 4000 * WIDE * 2
    on_device = plan_of(model=model, mst=kept)
    on_host = plan_of(model=model, mst=kept | {"offload_activations": True})
    for phase in ("forward", "loss", "backward"):
        assert bytes_of(on_device, phase)["kept_gate_up"] == LAYERS * tensors * of_tensor
        terms = bytes_of(on_host, phase)
        assert "kept_gate_up" not in terms
        assert terms["kept_gate_up_in_flight"] == 2 * tensors * of_tensor
        assert terms["kept_gate_up_on_host"] == LAYERS * tensors * of_tensor


def test_the_mlp_beside_experts_keeps_its_gate_and_up():
    terms = bytes_of(plan_of(model=EXPERTS, mst={"recompute": False, "keep_mlp": True}), "loss")
    assert terms["kept_gate_up"] == 2 * 4000 * INTERMEDIATE * 2
    assert terms["kept_gate_up_beside_experts"] == (LAYERS - 1) * 2 * 4000 * 40 * 2


def test_of_what_goes_to_the_host_the_widest_layers_are_in_flight():
    """Two dense layers, then two with experts: the dense ones follow each other."""
    kept = {"recompute": True, "keep_attention": True, "keep_mlp": True, "offload_activations": True}
    layers = {"num_hidden_layers": 4, "layer_types": None, "mlp_only_layers": [0, 1]}
    model = experts_with(**layers, shared_expert_intermediate_size=16)
    for phase in ("forward", "loss", "backward"):
        terms = bytes_of(plan_of(model=model, mst=kept), phase)
        assert terms["kept_gate_up_in_flight"] == 2 * 2 * 4000 * INTERMEDIATE * 2
        assert "kept_gate_up_beside_experts_in_flight" not in terms
    # Experts alone keep nothing there.
    model = experts_with(mlp_only_layers=[0], shared_expert_intermediate_size=0)
    assert not [name for name in bytes_of(plan_of(model=model, mst=kept), "loss") if "beside_experts" in name]


def test_the_loss_never_needs_less_than_its_scaled_gradients():
    terms = bytes_of(plan_of(mst={"loss_chunks": 4000}), "loss")
    assert "loss_logits" not in terms
    assert terms["scaled_head_gradient"] == 2 * VOCAB * HIDDEN
    assert terms["scaled_hidden_gradient"] == 2 * 4000 * HIDDEN


def test_micro_batch_multiplies_tokens():
    plan = plan_of(mst={"loss_chunks": 7}, seq_len=1000, train_micro_batch_size_per_gpu=4)
    assert plan.micro_batch_size == 4
    assert bytes_of(plan, "loss") == bytes_of(plan_of(mst={"loss_chunks": 7}, seq_len=4000), "loss")


def test_a_mlp_without_a_gate_has_one_tensor_and_one_matrix_less():
    backward = bytes_of(plan_of(model=GPT_NEOX, mst={"mlp_chunks": 1, "keep_mlp": False}, dtype="fp32"), "backward")
    assert backward["mlp_chunk"] == 3 * 4000 * INTERMEDIATE * 4
    assert backward["mlp_weight_gradients"] == 2 * HIDDEN * INTERMEDIATE * 4


def test_weight_gradients_are_rounded_when_the_chunks_are_gone():
    # So few tokens that the three matrices are more than all of a chunk.
    mst = {"recompute": False, "keep_mlp": False}
    terms = bytes_of(plan_of(seq_len=32, mst=mst), "backward")
    assert "mlp_chunk" not in terms
    assert terms["mlp_weight_gradients"] == 3 * HIDDEN * INTERMEDIATE * 4
    assert terms["rounded_weight_gradients"] == 3 * HIDDEN * INTERMEDIATE * 2
    assert "rounded_weight_gradients" not in terms_of(plan_of(seq_len=32, dtype="fp32", mst=mst), "backward")
    # Those of a layer that is computed again, of which one is rounded at a time; that is more than all of a chunk where
    # tokens are fewer still.
    terms = bytes_of(plan_of(model=wide_llama(), seq_len=8), "backward")
    assert terms["layer_weight_gradients"] == (LAYER + 3 * HIDDEN * (WIDE - INTERMEDIATE)) * 4
    assert terms["rounded_weight_gradients"] == HIDDEN * WIDE * 2


def test_experts_work_on_chunks_of_one_expert_and_return_the_gradients_of_all():
    only_experts = {"model": experts_with(mlp_only_layers=[], moe_intermediate_size=240)}
    plan = plan_of(**only_experts, mst={"mlp_chunks": 6})
    forward, backward = bytes_of(plan, "forward"), bytes_of(plan, "backward")
    rows = 3 * 4000 // 6
    assert backward["mlp_chunk"] == 11 * rows * 240 * 2
    assert backward["mlp_chunk_hidden_states"] == 3 * rows * HIDDEN * 2
    assert backward["expert_weight_gradients"] == 10 * 3 * HIDDEN * 240 * 4
    # Gate and up of ten experts, which are one product on a GPU; of more than 16, not all.
    assert backward["mlp_weight_gradients"] == 10 * 2 * HIDDEN * 240 * 2
    many = {"model": experts_with(mlp_only_layers=[], moe_intermediate_size=240, num_experts=40)}
    terms = bytes_of(plan_of(**many, mst={"mlp_chunks": 6}), "backward")
    assert terms["mlp_weight_gradients"] == 16 * 2 * HIDDEN * 240 * 2
    # In a layer that is not computed again they are summed for one expert at a time.
    kept = plan_of(**only_experts, mst={"mlp_chunks": 6, "recompute": False, "keep_mlp": False}, dtype="fp16")
    in_fp16 = bytes_of(kept, "backward")
    assert in_fp16["mlp_weight_gradients"] == 3 * HIDDEN * 240 * 4
    assert in_fp16["expert_weight_gradients"] == 10 * 3 * HIDDEN * 240 * 2
    assert backward["mlp_input_gradient_sum"] == 4000 * HIDDEN * 4
    # A token goes to an expert once: a chunk is never longer than all tokens.
    whole = bytes_of(plan_of(**only_experts, mst={"mlp_chunks": 1}), "forward")
    assert whole["mlp_chunk"] == 5 * 4000 * 240 * 2
    assert whole["mlp_output_sum"] == 4000 * HIDDEN * 4
    assert forward["layer_inputs"] == LAYERS * 4000 * HIDDEN * 2


def test_the_largest_of_the_dense_the_experts_and_the_shared_mlp_counts():
    sizes = {
        "dense": {"intermediate_size": 5000},
        "experts": {"moe_intermediate_size": 5000},
        "shared": {"shared_expert_intermediate_size": 5000},
    }
    backward = {
        name: bytes_of(plan_of(model=experts_with(**size), mst={"mlp_chunks": 1, "keep_mlp": False}), "backward")
        for name, size in sizes.items()
    }
    assert backward["dense"]["mlp_chunk"] == backward["shared"]["mlp_chunk"] == 4 * 4000 * 5000 * 2
    assert "experts_result" in backward["shared"]
    assert "experts_result" not in backward["dense"]
    assert backward["experts"]["mlp_chunk"] == 11 * 4000 * 5000 * 2


def test_the_router_loss_keeps_the_logits_of_every_sparse_layer():
    for recompute in (True, False):
        kept = bytes_of(plan_of(model=EXPERTS, mst={"recompute": recompute}), "loss")
        assert kept["router_logits"] == (LAYERS - 1) * 2 * 4000 * 10 * 2
    assert "router_logits" not in terms_of(plan_of(model=experts_with(output_router_logits=False)), "loss")


def test_gathered_parameters_are_all_experts_of_a_layer():
    zero = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    gathered = [
        bytes_of(plan_of(model=experts_with(num_experts=count), zero=zero), "forward") for count in (1000, 2000)
    ]
    more = gathered[1]["gathered_parameters"] - gathered[0]["gathered_parameters"]
    assert more == 1000 * (3 * 24 + 1) * HIDDEN * 2  # with the router's row of each
