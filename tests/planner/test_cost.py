"""The predicted time of a step, by hand from what moves and what is computed."""

from dataclasses import replace

import pytest
from planned import EXPERTS, GEMMA2, MODEL

from mst_ds.model_shape import ModelShape, flops_per_token, load_model_shape
from mst_ds.planner import gpu_by_name, gpu_of_device, make_plan, rates
from mst_ds.planner.cost import all_to_all_seconds, model_flops_utilisation, step_seconds
from mst_ds.planner.flops import attention_flops, matrix_flops
from mst_ds.planner.kept import copied_bytes
from mst_ds.planner.rates import attention_kernel, rates_of
from mst_ds.planner.search import choose_settings
from mst_ds.planner.traffic import launched_kernels, passed_bytes
from mst_ds.planner.workload import Workload
from mst_ds.settings import MstConfig, Settings
from mst_ds.zero import read_zero

GIB = 2**30
# Whatever is not looked at costs nothing.
ENDLESS = replace(
    gpu_by_name("H100"), **dict.fromkeys(("memory_rate", "node_rate", "network_rate", "host_rate"), float("inf"))
)
LLAMA_8B = "meta-llama/Llama-3.1-8B"
LLAMA_8B_SHAPE = load_model_shape(LLAMA_8B)


def workload(stage=3, *, model=MODEL, ranks=8, dtype="bf16", **settings):
    of_zero = {"offload_param", "offload_optimizer", "overlap_comm", "stage3_param_persistence_threshold"}
    # DeepSpeed's own threshold would leave all of such a small model whole on every rank.
    zero_keys = {"stage3_param_persistence_threshold": 0}
    zero_keys |= {key: settings.pop(key) for key in of_zero & settings.keys()}
    ds_config = {dtype: {"enabled": True}, "zero_optimization": {"stage": stage} | zero_keys}
    ds_config["gradient_accumulation_steps"] = settings.pop("accumulation", 1)
    places = {"seq_len": 4096, "ranks_per_node": ranks}
    places |= {key: settings.pop(key) for key in ("seq_len", "ranks_per_node", "reserve") if key in settings}
    zero = read_zero(ds_config, dp_world_size=ranks)
    shape = model if isinstance(model, ModelShape) else ModelShape.from_config(model)
    return Workload(shape, zero, settings=Settings(**settings), **places)


@pytest.fixture(autouse=True)
def free_launches(monkeypatch):
    """What is looked at here is large; `test_short_steps_wait_for_the_cpu` has a small one."""
    monkeypatch.setattr(rates, "_LAUNCH_SECONDS", 0.0)


def test_what_is_computed_takes_its_flops():
    work = workload(stage=0, ranks=1)
    forward, backward = attention_flops(work)
    # An H100's 989.5 TFLOP/s; heads of 16 are narrow ones, for which cuDNN attains 0.77 of 0.6 and of 0.5.
    of_compute = matrix_flops(work) / 0.62 + forward / (0.77 * 0.6) + backward / (0.77 * 0.5)
    of_compute /= 989.5e12
    assert step_seconds(work, ENDLESS) == pytest.approx(of_compute, rel=1e-12)
    accumulated = replace(work, zero=replace(work.zero, gradient_accumulation_steps=3))
    assert step_seconds(accumulated, ENDLESS) == pytest.approx(3 * of_compute, rel=1e-12)
    in_fp32 = (matrix_flops(work) + forward + backward) / (0.6 * ENDLESS.fp32_flops)
    assert step_seconds(replace(work, zero=replace(work.zero, dtype="fp32")), ENDLESS) == pytest.approx(
        in_fp32, rel=1e-12
    )


def test_attention_takes_the_rate_of_its_kernel():
    work = workload(stage=0, ranks=1, model=LLAMA_8B_SHAPE, recompute=True)
    forward, backward = attention_flops(work)
    assert backward / forward == pytest.approx(2.5 / 2, rel=1e-9)  # it runs again
    kept = work.with_settings(keep_attention=True)
    assert attention_flops(kept) == (forward // 2, backward)
    of_gpus = {
        ("H100", "sdpa"): ("cudnn", 0.6, 0.5),
        ("H100", "flash_attention_2"): ("flash 2", 0.38, 0.31),
        ("H100", "flash_attention_3"): ("flash 3", 0.62, 0.54),
        ("A100-80GB", "sdpa"): ("flash 2", 0.61, 0.53),
        ("B200", "flash_attention_4"): ("flash 4", 0.6, 0.5),
    }
    for (name, attention), (kernel, share, share_back) in of_gpus.items():
        gpu, of_kernel = gpu_by_name(name), work.with_settings(attention=attention)
        assert attention_kernel(of_kernel, gpu) == kernel
        found = rates_of(of_kernel, gpu)
        assert found.attention_forward == pytest.approx(share * gpu.flops, rel=1e-12)
        assert found.attention_backward == pytest.approx(share_back * gpu.flops, rel=1e-12)


def test_cudnn_takes_one_document_without_a_window():
    """The rate is that of the kernel of most of attention: of half its layers with a window none of a long sequence."""
    work, gpu = workload(stage=0, ranks=1, model=LLAMA_8B_SHAPE), gpu_by_name("H100")
    layers = work.shape.num_hidden_layers
    for windowed, kernel in ((layers, "flash 2"), (layers // 2, "cudnn")):
        shape = replace(work.shape, sliding_windows=(1024,) * windowed, window_layers=tuple(range(windowed)))
        assert attention_kernel(replace(work, shape=shape), gpu) == kernel
    assert attention_kernel(replace(work, sequences_per_sample=2), gpu) == "flash 2"


def test_passes_over_tensors_take_their_bytes():
    """Of Llama's layer by hand: two norms, the rotary embedding of queries and keys, two sums, the MLP, the loss."""
    work = workload(stage=0, ranks=1, model=LLAMA_8B_SHAPE)
    hidden, inner, heads = 4096, 14336, (32 + 8) * 128
    for fused, norm, rotary, activation, logit in ((False, 40 + 78, 14, 38, 44), (True, 4 + 8, 4, 18, 6)):
        of_layer = 2 * hidden * norm + 2 * heads * rotary + inner * activation + 2 * hidden * 12
        expected = 4096 * (32 * of_layer + 128256 * logit)
        assert passed_bytes(work, fused=fused) == expected
    again = passed_bytes(work.with_settings(recompute=True), fused=True) - passed_bytes(work, fused=True)
    assert again == 4096 * 32 * (2 * hidden * 4 + heads * 4)
    gpu = replace(ENDLESS, flops=float("inf"), memory_rate=3350e9)
    # A second micro-batch passes once more, and has no optimizer's step of its own.
    twice = replace(work, zero=replace(work.zero, gradient_accumulation_steps=2))
    more = step_seconds(twice, gpu) - step_seconds(work, gpu)
    assert more == pytest.approx(passed_bytes(work, fused=True) / (0.8 * 3350e9), rel=1e-9)


def test_short_steps_wait_for_the_cpu(monkeypatch):
    monkeypatch.setattr(rates, "_LAUNCH_SECONDS", 8e-6)
    work = workload(stage=0, ranks=1)
    gpu = replace(ENDLESS, flops=float("inf"))
    assert step_seconds(work, gpu) == pytest.approx(launched_kernels(work) * 8e-6, rel=1e-9)
    chunked = work.with_settings(recompute=True, layer_chunks=2, mlp_chunks=3)
    assert launched_kernels(chunked) == work.shape.num_hidden_layers * (2 * 80 + 6 * 24) + 16


# Times the parameters' bytes, in a step of two micro-batches whose computing takes no time.
MOVED = {0: 2, 1: 2, 2: 2 * 1 + 1, 3: 2 * (2 + 1)}


@pytest.mark.parametrize("overlap_comm", [True, False])
@pytest.mark.parametrize("stage", MOVED)
@pytest.mark.parametrize(("ranks_per_node", "rate"), [(8, 0.8 * 450e9), (4, 0.8 * 200e9)])
def test_collectives_of_zero_move_the_parameters(stage, overlap_comm, ranks_per_node, rate):
    work = workload(stage, accumulation=2, overlap_comm=overlap_comm, ranks_per_node=ranks_per_node)
    gpu = replace(gpu_by_name("H100"), flops=float("inf"), memory_rate=float("inf"))
    expected = MOVED[stage] * 2 * work.shape.parameter_count * 7 / 8 / rate
    if not overlap_comm:
        # Gradients are reduced first, and what is gathered beside that waits for no one.
        reduced = {0: 2, 1: 1, 2: 2, 3: 2}[stage]
        expected *= max(reduced, MOVED[stage] - reduced) / MOVED[stage]
    assert step_seconds(work, gpu) == pytest.approx(expected, rel=1e-12)


def test_persistent_parameters_are_gathered_once_a_step():
    gpu = replace(ENDLESS, flops=float("inf"), node_rate=450e9)
    none, all_of_them = (workload(accumulation=4, stage3_param_persistence_threshold=n) for n in (0, 10**9))
    of_parameters = 2 * none.shape.parameter_count * 7 / 8 / (0.8 * gpu.node_rate)
    # Gradients are reduced in each micro-batch beside that.
    assert step_seconds(none, gpu) == pytest.approx(4 * (2 + 1) * of_parameters, rel=1e-12)
    assert step_seconds(all_of_them, gpu) == pytest.approx((1 + 4) * of_parameters, rel=1e-12)


def test_copies_hide_behind_what_is_computed():
    work = workload(ranks=1, stage=0, recompute=True, keep_attention=True, offload_activations=True)
    computing = step_seconds(work, ENDLESS)
    bytes_of_step = copied_bytes(work)
    assert step_seconds(work, replace(ENDLESS, host_rate=bytes_of_step / computing * 1.01)) == computing
    slow = replace(ENDLESS, host_rate=bytes_of_step / computing / 2)
    assert step_seconds(work, slow) == pytest.approx(2 * computing, rel=1e-12)


def test_all_to_alls_stay_in_the_node_if_they_can():
    work = workload(sp_size=4)
    of_gpu = rates_of(work, gpu_by_name("H100"))
    shape = work.shape
    inputs = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim
    sent = work.tokens * shape.num_hidden_layers * (3 * inputs + 3 * shape.num_attention_heads * shape.head_dim) * 2
    launches = 5 * shape.num_hidden_layers * 3e-5
    assert all_to_all_seconds(work, of_gpu) == pytest.approx(sent * 3 / 4 / 360e9 + launches, rel=1e-12)
    apart = replace(work, ranks_per_node=2)
    assert all_to_all_seconds(apart, of_gpu) == pytest.approx(sent * 2 / 4 / 40e9 + launches, rel=1e-12)
    assert all_to_all_seconds(work.with_settings(sp_size=1), of_gpu) == 0
    # Of twelve ranks on nodes of four, the second six are two and four: the two wait for four of others.
    uneven = workload(sp_size=6, ranks=12, ranks_per_node=4)
    sent_by_six = sent // work.tokens * uneven.tokens
    assert all_to_all_seconds(uneven, of_gpu) == pytest.approx(sent_by_six * 4 / 6 / 40e9 + launches, rel=1e-12)
    # Attention again: its inputs and outputs, but keys and values are there for the backward, in any number of chunks.
    heads = 2 * shape.num_attention_heads
    for chunks in (1, 4):
        again = work.with_settings(recompute=True, layer_chunks=chunks)
        more = all_to_all_seconds(again, of_gpu) - all_to_all_seconds(work, of_gpu) - launches * (chunks - 1)
        sent_again = work.tokens * shape.num_hidden_layers * heads * shape.head_dim * 2
        assert more == pytest.approx(sent_again * 3 / 4 / 360e9, rel=1e-9)
    assert all_to_all_seconds(work.with_settings(recompute=True, keep_attention=True), of_gpu) == all_to_all_seconds(
        work, of_gpu
    )
    grouped = all_to_all_seconds(work.with_settings(head_groups=2), of_gpu)
    assert grouped == pytest.approx(all_to_all_seconds(work, of_gpu) + launches, rel=1e-9)


def test_the_optimizer_reads_and_writes_its_states():
    gpu = replace(gpu_by_name("H100"), flops=float("inf"), node_rate=float("inf"))

    def of_optimizer(work, gpu):
        twice = replace(work, zero=replace(work.zero, gradient_accumulation_steps=2))
        return 2 * step_seconds(work, gpu) - step_seconds(twice, gpu)

    work = workload(stage=2)
    count = work.sharded(work.shape.parameter_count, from_stage=1)
    assert of_optimizer(work, gpu) == pytest.approx(28 * count / (0.8 * 3350e9), rel=1e-9)
    on_host = workload(stage=2, offload_optimizer={"device": "cpu"})
    assert of_optimizer(on_host, gpu) == pytest.approx(28 * count / 50e9 + 4 * count / 50e9, rel=1e-9)
    on_drive = of_optimizer(workload(stage=2, offload_optimizer={"device": "nvme"}), gpu)
    assert on_drive == pytest.approx(of_optimizer(on_host, gpu) + 24 * count / 1.5e9, rel=1e-9)
    without_moments = replace(work, zero=replace(work.zero, optimizer_moments=0))
    assert of_optimizer(without_moments, gpu) == pytest.approx(12 * count / (0.8 * 3350e9), rel=1e-9)
    without_moments = replace(without_moments, zero=replace(without_moments.zero, optimizer_offload="nvme"))
    assert of_optimizer(without_moments, gpu) == pytest.approx((12 + 4) * count / 50e9 + 8 * count / 1.5e9, rel=1e-9)


def test_chunks_but_the_first_read_and_write_the_sums_of_gradients():
    gpu = replace(ENDLESS, flops=float("inf"), memory_rate=3350e9)

    def more(work, **counts):
        return step_seconds(work.with_settings(**counts), gpu) - step_seconds(work, gpu)

    work = workload(stage=0, ranks=1, accumulation=2)
    shape = work.shape
    of_mlps = shape.num_hidden_layers * 3 * shape.hidden_size * shape.intermediate_size
    of_head = shape.hidden_size * shape.vocab_size
    assert more(work, mlp_chunks=5) == pytest.approx(2 * 4 * of_mlps * 8 / (0.8 * 3350e9), rel=1e-6)
    assert more(work, loss_chunks=3) == pytest.approx(2 * 2 * of_head * 8 / (0.8 * 3350e9), rel=1e-6)
    # Chunks are of one expert's tokens, or of all tokens where every token goes through the MLP.
    sparse = workload(stage=0, ranks=1, model=EXPERTS)
    shape, experts = sparse.shape, sparse.shape.experts
    of_experts = experts.num_sparse_layers * experts.num_experts * experts.intermediate_size
    of_others = experts.num_sparse_layers * experts.shared_intermediate_size
    of_others += shape.num_dense_layers * shape.intermediate_size
    for chunks, again in ((experts.num_experts, 0), (experts.num_experts + 1, 1)):
        width = of_experts * again + of_others * (chunks - 1)
        expected = 3 * shape.hidden_size * width * 8 / (0.8 * 3350e9)
        assert more(sparse, mlp_chunks=chunks) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("device", "rate"), [("cpu", 50e9), ("nvme", 1.5e9)])
def test_offloaded_parameters_come_from_the_host_or_a_drive(device, rate):
    gpu = replace(ENDLESS, flops=float("inf"), host_rate=50e9)
    work = workload(stage=3, offload_param={"device": device})
    assert step_seconds(work, gpu) == pytest.approx(
        2 * 2 * work.sharded(work.shape.parameter_count, from_stage=3) / rate, rel=1e-12
    )


@pytest.mark.parametrize("model", [MODEL, GEMMA2], ids=["full", "windows"])
def test_the_sequences_of_a_sample_do_not_attend_to_each_other(model):
    """Two of a sample are two of a micro-batch."""
    pair = replace(workload(model=model, seq_len=20000, sp_size=2), sequences_per_sample=2)
    alone = replace(pair, seq_len=10000, sequences_per_sample=1, zero=replace(pair.zero, micro_batch_size=2))
    assert attention_flops(pair) == attention_flops(alone)
    assert model_flops_utilisation(pair, ENDLESS, 1.0) == model_flops_utilisation(alone, ENDLESS, 1.0)


@pytest.mark.parametrize("model", [MODEL, EXPERTS])
def test_utilisation_counts_the_models_own_flops(model):
    work = workload(model=model, sp_size=2, recompute=True, accumulation=3)
    # Two ranks take one sequence of 4096 tokens in each of three micro-batches.
    model_flops = 3 * 4096 * flops_per_token(work.shape, 4096) / 2
    assert model_flops_utilisation(work, ENDLESS, 2.0) == pytest.approx(model_flops / 2 / 989.5e12, rel=1e-12)


def test_the_choice_follows_the_rates():
    """Attention's output is fetched from the host if the link is fast, and computed again if it is slow."""
    work = workload(model=MODEL, seq_len=32768, ranks=1)
    kept = {}
    for host_rate in (1e15, 1e6):
        gpu = replace(gpu_by_name("H100"), host_rate=host_rate)
        mst = MstConfig({"recompute": True, "offload_activations": True})
        chosen = choose_settings(work, mst, device_memory=GIB * 100, host_memory=GIB * 100, gpu=gpu)
        kept[host_rate] = chosen.settings.keep_attention
    assert kept == {1e15: True, 1e6: False}


def test_times_are_predicted_for_a_gpu_that_is_named():
    arguments = {"world_size": 8, "seq_len": 131072, "device_memory": 79 * GIB}
    ds_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    unknown = make_plan(LLAMA_8B, ds_config, **arguments)
    assert (unknown.predicted_step_seconds, unknown.predicted_mfu) == (None, None)
    assert all(choice.seconds is None for choice in unknown.choices)
    plan = make_plan(LLAMA_8B, ds_config, **arguments, gpu=gpu_by_name("H100"))
    assert 0 < plan.predicted_step_seconds < 60
    assert 0.3 < plan.predicted_mfu < 0.6
    by_setting = {choice.setting: choice.seconds for choice in plan.choices}
    assert by_setting["recompute"] * (1 if plan.settings.recompute else -1) > 0
    assert replace(plan, predicted_step_seconds=None, predicted_mfu=None, choices=()) == replace(unknown, choices=())


def test_devices_by_the_drivers_name():
    found = {
        "NVIDIA H100 80GB HBM3": 79.1,
        "NVIDIA A100-SXM4-40GB": 39.4,
        "NVIDIA A100-SXM4-80GB": 79.2,
        "NVIDIA L40S": 44.4,
        "NVIDIA GeForce RTX 4090": 23.6,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": 79.1,
    }
    gpus = [gpu_of_device(name, int(gib * GIB)) for name, gib in found.items()]
    assert [gpu and gpu.name for gpu in gpus] == ["H100", "A100-40GB", "A100-80GB", "L40S", None, None]


@pytest.mark.parametrize(
    ("name", "gib", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 78.0, "H100"),
        ("NVIDIA H100 80GB HBM3", 79.65, "H100"),
        ("NVIDIA A100-SXM4-40GB", 38.5, "A100-40GB"),
        ("NVIDIA H200", 139.7, "H200"),
        ("NVIDIA H100 80GB HBM3", 39.5, None),  # half of one, as a virtual GPU
        ("NVIDIA H100", 93.0, None),
    ],
)
def test_a_driver_may_keep_a_gibibyte_more(name, gib, expected):
    gpu = gpu_of_device(name, int(gib * GIB))
    assert (gpu and gpu.name) == expected
