"""Values of another width than keys: what attention copies and differentiates at one width is planned."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from mst_ds.attention import AttentionSpec, CausalAttention
from mst_ds.geometry import HeadLayout
from mst_ds.memory.dry_run import as_on_an_accelerator
from mst_ds.memory.live import LiveMemory
from mst_ds.model_shape import ModelShape
from mst_ds.planner.attention import gathered_step, local_term, query_key_value_width
from mst_ds.planner.workload import Workload
from mst_ds.sequence_parallel.sequence_attention import SequenceAttention
from mst_ds.settings import Settings
from mst_ds.zero import read_zero

HEADS, TOKENS = 8, 4096


def workload(key_width, value_width):
    config = LlamaConfig(hidden_size=64, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=key_width)
    shape = dataclasses.replace(ModelShape.from_config(config), value_head_dim=value_width)
    zero = read_zero({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}, dp_world_size=1)
    return Workload(shape, zero, TOKENS, Settings(recompute=True))


def peak_of_backward(key_width, value_width):
    with FakeTensorMode(), as_on_an_accelerator():
        widths = (key_width, key_width, value_width)
        tensors = [torch.empty(1, HEADS, TOKENS, d, dtype=torch.bfloat16, requires_grad=True) for d in widths]
        attention = SequenceAttention(CausalAttention("sdpa"), AttentionSpec(0.1), None, HeadLayout(HEADS, HEADS, 1, 1))
        grad_output = torch.empty(1, TOKENS, HEADS, value_width, dtype=torch.bfloat16)
        with LiveMemory() as memory:
            output = attention(*tensors)
            memory.reset_peak()
            kept = memory.live
            output.backward(grad_output)
    return memory.peak - kept


@pytest.mark.parametrize(("key_width", "value_width"), [(192, 192), (192, 128), (128, 192)])
def test_the_backward_needs_what_is_planned(key_width, value_width):
    work = workload(key_width, value_width)
    planned = sum(term.bytes for term in gathered_step(work, backward=True) if term.kind == "activation")
    planned += local_term(work, "gradients", query_key_value_width(work.shape)).bytes
    assert peak_of_backward(key_width, value_width) == pytest.approx(planned, rel=0.01)
