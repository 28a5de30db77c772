"""Values of another width than keys: what attention copies and differentiates at one width is planned."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from mst_ds.attention import AttentionSpec, CausalAttention
from mst_ds.geometry import HeadLayout
from mst_ds.memory.dry_run import KernelWorkspace, as_on_an_accelerator
from mst_ds.memory.live import LiveMemory
from mst_ds.model_shape import ModelShape
from mst_ds.planner.attention import gathered_step, local_term, query_key_value_width
from mst_ds.planner.workload import Workload
from mst_ds.sequence_parallel.head_exchange import HeadExchange
from mst_ds.sequence_parallel.sequence_attention import SequenceAttention
from mst_ds.settings import Settings
from mst_ds.zero import read_zero

HEADS, TOKENS = 8, 4096


def workload(key_width, value_width, kv_heads):
    config = LlamaConfig(hidden_size=64, num_attention_heads=HEADS, num_key_value_heads=kv_heads, head_dim=key_width)
    shape = dataclasses.replace(ModelShape.from_config(config), value_head_dim=value_width)
    zero = read_zero({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}, dp_world_size=1)
    return Workload(shape, zero, TOKENS, Settings(recompute=True))


def peak_of_backward(key_width, value_width, kv_heads):
    with FakeTensorMode(), as_on_an_accelerator():
        of_heads = zip((HEADS, kv_heads, kv_heads), (key_width, key_width, value_width), strict=True)
        tensors = [torch.empty(1, n, TOKENS, d, dtype=torch.bfloat16, requires_grad=True) for n, d in of_heads]
        heads = HeadExchange(None, HeadLayout(HEADS, kv_heads, 1, 1))
        attention = SequenceAttention(CausalAttention("sdpa"), AttentionSpec(0.1), heads)
        grad_output = torch.empty(1, TOKENS, HEADS, value_width, dtype=torch.bfloat16)
        with LiveMemory() as memory, KernelWorkspace():
            output = attention(*tensors)
            memory.reset_peak()
            kept = memory.live
            output.backward(grad_output)
    return memory.peak - kept


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize(("key_width", "value_width"), [(192, 192), (192, 128), (128, 192)])
def test_the_backward_needs_what_is_planned(key_width, value_width, kv_heads):
    """Its kernel's workspace is that of heads as wide as the widest."""
    work = workload(key_width, value_width, kv_heads)
    planned = sum(term.bytes for term in gathered_step(work, backward=True))
    planned += local_term(work, "gradients", query_key_value_width(work.shape)).bytes
    assert peak_of_backward(key_width, value_width, kv_heads) == pytest.approx(planned, rel=0.01)
