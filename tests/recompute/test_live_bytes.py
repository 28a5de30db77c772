"""What is alive in a step: nothing that grows with the layers where it lies on the host, and nothing after the step."""

import gc
from contextlib import contextmanager

import pytest
import torch
from tiny import tiny_llama

from benchmarks.contenders import Work, build_contender
from mst_ds.memory.dry_run import host_left_out
from mst_ds.memory.live import LiveMemory

WORK = Work(seq_len=256, mlp_chunks=4, loss_chunks=4)
HIDDEN, INTERMEDIATE = 64, 224
IDS = torch.arange(WORK.seq_len)[None] % 97
# Of a layer in fp32: its input, attention's output, and the log-sum-exp of each of 8 heads; bytes for each token.
INPUT, OUTPUT, LOG_SUM_EXP = (4 * width for width in (HIDDEN, HIDDEN, 8))
GATE_UP = 2 * 4 * INTERMEDIATE
# What a layer keeps on the device, and on the host.
OURS = {
    "mst_ds": (INPUT + OUTPUT + LOG_SUM_EXP, 0),
    "mst_ds, attention again": (INPUT, 0),
    "mst_ds, MLP kept": (INPUT + OUTPUT + LOG_SUM_EXP + GATE_UP, 0),
    "mst_ds, offload": (0, INPUT + OUTPUT + LOG_SUM_EXP),
    "mst_ds, MLP kept, offload": (0, INPUT + OUTPUT + LOG_SUM_EXP + GATE_UP),
}


def llama(layers):
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": 8}
    return tiny_llama(**sizes, num_key_value_heads=2, head_dim=8, num_hidden_layers=layers, use_cache=False)


def layer_gradients(model):
    return sum(parameter.nbytes for parameter in model.model.layers[0].parameters())


@contextmanager
def without_collector():
    """What only the garbage collector would free counts as alive."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def peak(name, layers, length):
    contender = build_contender(name, llama(layers), Work(length, mlp_chunks=4, loss_chunks=4))
    ids = torch.arange(length)[None] % 97
    with without_collector(), LiveMemory() as memory, host_left_out(memory):
        contender.loss(ids).backward()
    return memory.peak


@pytest.mark.parametrize("name", OURS)
def test_what_grows_with_the_layers(name):
    length, (kept, _) = 1024, OURS[name]
    growth = peak(name, 8, length) - peak(name, 4, length)
    # What a layer keeps goes in the backward as its gradients come: the larger of the two grows.
    gradients = layer_gradients(llama(1))
    assert gradients < INPUT * length
    assert growth == pytest.approx(4 * max(kept * length, gradients), rel=0.02)


@pytest.mark.parametrize("chunks", [1, 4, 16])
def test_peak_is_at_most_deepspeeds(chunks):
    work = Work(seq_len=512, mlp_chunks=chunks, loss_chunks=chunks)
    ids = torch.arange(work.seq_len)[None] % 97
    model, peaks = llama(4), {}
    for name in ("mst_ds, attention again", "DeepSpeed ALST"):
        model.zero_grad()
        contender = build_contender(name, model, work)
        with LiveMemory() as memory:
            contender.loss(ids).backward()
        peaks[name] = memory.peak
    assert peaks["mst_ds, attention again"] <= peaks["DeepSpeed ALST"]


def gradient_bytes(model):
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("name", OURS)
def test_nothing_is_left_after_steps(name):
    model = llama(2)
    contender = build_contender(name, model, WORK)
    with without_collector(), LiveMemory() as memory:
        for _ in range(20):
            model.zero_grad()
            contender.loss(IDS).backward()
            assert memory.live == gradient_bytes(model)


@pytest.mark.parametrize("name", OURS)
def test_nothing_is_left_of_a_forward_without_a_backward(name):
    model = llama(2)
    contender = build_contender(name, model, WORK)
    with without_collector(), LiveMemory() as memory:
        lives = []
        for _ in range(3):
            contender.loss(IDS)
            lives.append(memory.live)
        # Until the next forward begins, copies to the host may be on their way: two layers' tensors, here and there.
        _, on_host = OURS[name]
        assert lives == [2 * 2 * on_host * WORK.seq_len] * 3
        contender.loss(IDS).backward()
        assert memory.live == gradient_bytes(model)


@pytest.mark.parametrize("name", OURS)
def test_nothing_is_left_of_two_forwards_before_their_backwards(name):
    model = llama(2)
    contender = build_contender(name, model, WORK)
    with without_collector(), LiveMemory() as memory:
        for _ in range(2):
            model.zero_grad()
            losses = [contender.loss(IDS) for _ in range(2)]
            while losses:
                losses.pop(0).backward()
            assert memory.live == gradient_bytes(model)


@pytest.mark.parametrize("name", OURS)
def test_a_loss_that_is_still_there_holds_nothing(name):
    model = llama(2)
    contender = build_contender(name, model, WORK)
    with without_collector(), LiveMemory() as memory:
        loss = contender.loss(IDS)
        loss.backward()
        assert memory.live == gradient_bytes(model) + loss.nbytes
