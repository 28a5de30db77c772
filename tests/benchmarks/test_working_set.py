"""The dry run: its figure for ordinary recompute and for a layer in chunks, and what grows with more layers."""

import pytest

from benchmarks.contenders import Work
from benchmarks.working_set import peak_bytes, working_set


def test_ordinary_recompute_needs_a_whole_layer():
    # Seven tensors of intermediate size (3.5 x hidden) at the MLP's backward, and the rest of the layer.
    assert 7 * 3.5 < working_set("recompute") == pytest.approx(32.8, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mst_ds", "mst_ds, offload"])
def test_ours_needs_little_more_than_a_third_of_it(name: str):
    # Neither an MLP's intermediate tensors nor fp32 copies of the shard.
    assert 5 < working_set(name) < 12.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mst_ds", "mst_ds, offload"])
def test_a_layer_in_chunks_needs_little_more_than_what_is_whole(name: str):
    """The gradient of its output, over which that of its input is written, and those of keys and values in fp32."""
    whole = 1 + 2 * (1024 / 4096) * 2
    assert whole < working_set(name, seq_len=262_144, chunks=32, layer_chunks=16) < 4


@pytest.mark.slow
def test_what_lies_on_the_host_is_left_out():
    size, work = "cpu-small", Work(8192, mlp_chunks=4, loss_chunks=4)
    growth_on_device, growth_on_host = (
        peak_bytes(name, 8, size=size, work=work) - peak_bytes(name, 4, size=size, work=work)
        for name in ("mst_ds", "mst_ds, offload")
    )
    # Of 4 more layers in fp32: input, output of attention and log-sum-exp (one for each of 8 heads); gradients.
    kept = 4 * 4 * 8192 * (512 + 512 + 8)
    gradients = 4 * 4 * (3 * 512 * 1792 + 2 * 512 * 512 + 2 * 512 * 128 + 2 * 512)
    assert growth_on_device == pytest.approx(kept, rel=0.05)
    assert growth_on_host == pytest.approx(gradients, rel=0.05)
