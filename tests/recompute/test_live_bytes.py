"""What is alive in a step: nothing that grows with the layers where it lies on the host, and nothing after the step."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from garbage import without_collector
from tiny import tiny_llama

from benchmarks.contenders import Work, build_contender
from mst_ds.layer_stream import stream_of
from mst_ds.memory.dry_run import host_left_out
from mst_ds.memory.live import LiveMemory
from mst_ds.recompute import HostStore, stores

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
        for _ in range(4):
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


def test_of_what_is_on_the_host_two_chunks_are_on_the_device(monkeypatch):
    """In a backward: the one that is differentiated and the one before it, and of the keys and values that it reads the
    same."""
    chunks, length = 8, 1024
    contender = build_contender("mst_ds, offload", llama(2), replace(WORK, seq_len=length, layer_chunks=chunks))
    copy_back, arrived = stores._KeptOnHost._copy_back, LiveMemory()

    def metered(kept):
        with arrived:
            return copy_back(kept)

    monkeypatch.setattr(stores._KeptOnHost, "_copy_back", metered)
    loss = contender.loss(torch.arange(length)[None] % 97)
    assert arrived.peak == 0
    with without_collector():
        loss.backward()
    keys_values = 2 * 4 * 2 * 8  # of 2 heads of 8, in fp32
    assert arrived.peak == 2 * (INPUT + OUTPUT + LOG_SUM_EXP + keys_values) * length // chunks
    assert arrived.live == 0


class CountedPieces(stores.PinnedPieces):
    in_use = 0

    def take(self, size):
        CountedPieces.in_use += 1
        return super().take(size)

    def give_back(self, pieces):
        CountedPieces.in_use -= len(pieces)
        super().give_back(pieces)


@pytest.mark.slow
def test_many_steps_leave_memory_as_it_was(monkeypatch):
    """On the device and on the host, whose memory is in pieces, as where copies have a stream."""
    monkeypatch.setattr(stores, "PinnedPieces", CountedPieces)
    at_once = SimpleNamespace(wait_stream=lambda _: None, wait_event=lambda _: None, record_event=lambda: None)
    module = SimpleNamespace(Stream=lambda _: at_once, current_stream=lambda _: at_once, stream=lambda _: nullcontext())
    model = llama(1)
    contender = build_contender("mst_ds, offload", model, Work(256, 1, 1, layer_chunks=4))
    stream_of(contender.model).store = HostStore(lambda _: module)
    found = []
    with without_collector(), LiveMemory() as memory:
        for _ in range(50):
            model.zero_grad()
            contender.loss(IDS).backward()
            found.append((memory.live, CountedPieces.in_use))
    assert found[4][0] > gradient_bytes(model)  # the pieces' slab
    assert set(found[4:]) == {(found[4][0], 0)}
