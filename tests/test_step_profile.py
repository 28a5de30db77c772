"""A profiled step: its seconds by kind of work, and the trace that it leaves."""

import gzip
import json
import math

import pytest
import torch

from mst_ds.training.step_profile import (
    TRACE_FILE,
    StepProfile,
    by_kind,
    kind_of,
    seconds_of_kernels,
    step_to_profile,
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", "matrices"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrices"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x128>", "matrices"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x64", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>", "attention"),
        ("fmha_cutlassB_bf16_aligned_128x64_k128_sm80", "attention"),
        ("Memcpy HtoD (Pinned -> Device)", "host copies"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "passes"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "passes"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16, float, 128, 16, 4, 4, false>", "matrices"),
        ("aten::baddbmm", "matrices"),
        ("aten::addmm_", "matrices"),
        ("aten::_grouped_mm", "matrices"),
        ("aten::addcmul", "passes"),
        ("_rms_norm_forward_kernel", "passes"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert kind_of(name) == kind
    assert by_kind({name: 2.0, "_other": 1.0})[kind] >= 2.0
    assert math.isclose(sum(by_kind({name: 2.0, "_other": 1.0}).values()), 3.0)


def test_a_profile_is_of_one_micro_batch_and_of_the_optimizer(tmp_path):
    weight = torch.randn(64, 64, requires_grad=True)
    with StepProfile(torch.device("cpu"), tmp_path / "profile", step=3) as profile:
        for _ in range(2):
            loss = torch.softmax(weight @ weight, 0).square().sum()
            profile.end("loss")
            loss.backward()
            profile.end("backward")
        found = dict(profile.seconds)
        weight.square()
        profile.end("optimizer_step")
    assert found["matrices"] > 0
    assert found["passes"] > 0
    assert found["matrices"] + found["passes"] < found["micro-batch"]
    assert found["attention"] == found["collectives"] == 0
    assert profile.seconds == found | {"optimizer": profile.seconds["optimizer"]}
    assert 0 < profile.seconds["optimizer"] < math.inf
    events = json.loads(gzip.decompress((tmp_path / "profile" / TRACE_FILE).read_bytes()))["traceEvents"]
    # Forward and backward, once.
    assert sum(event.get("name") == "aten::mm" for event in events) == 3


@pytest.mark.parametrize(("steps_done", "max_steps", "expected"), [(0, 9, 3), (0, 2, 2), (5, 9, 8), (7, 9, 9)])
def test_the_third_step_of_a_process_is_profiled(steps_done, max_steps, expected):
    assert step_to_profile(steps_done=steps_done, max_steps=max_steps) == expected


def test_on_a_cpu_kernels_are_operators_and_no_nodes_of_autograd():
    weight = torch.randn(8, 8, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        (weight @ weight).sum().backward()
    assert any("autograd" in event.key for event in profiler.key_averages())
    assert {name.split("::")[0] for name in seconds_of_kernels(profiler, torch.device("cpu"))} == {"aten"}
