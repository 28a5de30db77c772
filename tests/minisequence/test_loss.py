"""The chunked LM head and cross-entropy against plain torch."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from count_products import CountProducts
from error_budget import (
    assert_equal_but_for_order,
    assert_within_budget,
    gradients,
    leaves,
    relative_error,
    value_and_gradients,
)
from plain_loss import HIDDEN, ONE, VOCAB, make_labels, make_tensors, our_loss, plain_loss
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_ds.memory.live import LiveMemory

MIB = 2**20


assert_same = functools.partial(assert_equal_but_for_order, atol=1e-14)


@functools.cache
def truth_and_reference(dtype, bias):
    shape = (3, 1021)
    tensors = make_tensors(dtype, shape, bias=bias)
    labels = make_labels(shape)
    plain = functools.partial(plain_loss, labels)
    truth = value_and_gradients(plain, tensors, torch.float64, ONE)
    return tensors, labels, truth, value_and_gradients(plain, tensors, dtype, ONE)


@pytest.mark.parametrize("chunks", [4, 256])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_error_budget(dtype, bias, chunks):
    tensors, labels, truth, reference = truth_and_reference(dtype, bias)
    candidate = value_and_gradients(functools.partial(our_loss, chunks, labels), tensors, dtype, ONE)
    assert_within_budget(candidate, reference, truth)
    assert candidate["output"].dtype == torch.float32
    assert all(candidate[name].dtype == dtype for name in tensors)


def test_bf16_error_does_not_grow_with_the_number_of_chunks():
    tensors, labels, truth, _ = truth_and_reference(torch.bfloat16, True)
    errors = {}
    for chunks in (1, 512):
        candidate = value_and_gradients(functools.partial(our_loss, chunks, labels), tensors, torch.bfloat16, ONE)
        errors[chunks] = {name: relative_error(candidate[name], truth[name]) for name in tensors}
    # One rounding to bf16 at the end is the whole difference; sums kept in bf16 grow it ten times.
    assert all(errors[512][name] <= 1.01 * errors[1][name] for name in tensors), errors


@pytest.mark.parametrize(("tokens", "chunks"), [(9, 4), (101, 7), (13, 64), (1, 3), (3, 1)])
def test_every_token_counts_at_uneven_tails(tokens, chunks):
    """A lost or doubled token shows in its own row, in the head's gradient and in the loss."""
    tensors, labels = make_tensors(torch.float64, (tokens,)), torch.randint(VOCAB, (tokens,))
    plain = value_and_gradients(functools.partial(plain_loss, labels), tensors, torch.float64, ONE)
    ours = value_and_gradients(functools.partial(our_loss, chunks, labels), tensors, torch.float64, ONE)
    assert_same(ours, plain)
    assert (ours["x"].norm(dim=-1) > 0).all()


@pytest.mark.parametrize(
    "valid", [range(8), range(56, 64), range(60, 61), [0, 9, 10, 11, 50, 63]], ids=["first", "last", "one", "some"]
)
def test_ignored_labels_that_lie_unevenly_over_the_chunks(valid):
    """Whole chunks of 8 without a valid label, beside full ones: a mean of chunk means would be wrong."""
    tensors = make_tensors(torch.float64, (2, 32))
    labels = torch.full((64,), -100)
    labels[list(valid)] = torch.randint(VOCAB, (len(valid),))
    labels = labels.view(2, 32)
    plain = value_and_gradients(functools.partial(plain_loss, labels), tensors, torch.float64, ONE)
    assert_same(value_and_gradients(functools.partial(our_loss, 8, labels), tensors, torch.float64, ONE), plain)


def test_an_ignore_index_of_ones_own():
    tensors, labels = make_tensors(torch.float64, (2, 19)), make_labels((2, 19)).masked_fill_(torch.eye(2, 19) > 0, 7)
    labels[labels == -100] = 7
    plain, ours = (
        value_and_gradients(functools.partial(loss, labels, ignore_index=7), tensors, torch.float64, ONE)
        for loss in (plain_loss, functools.partial(our_loss, 4))
    )
    assert_same(ours, plain)


@pytest.mark.parametrize("num_items", [None, 0, 5], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_without_a_valid_label_loss_and_gradients_are_zero(dtype, num_items):
    tensors = leaves(make_tensors(dtype, (2, 19)))
    loss = our_loss(4, torch.full((2, 19), -100), tensors, num_items_in_batch=num_items)
    (loss * 65536).backward()
    assert loss == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(tensors).values())


def test_no_tokens():
    tensors = leaves(make_tensors(torch.float32, (2, 0)))
    loss = our_loss(4, torch.empty(2, 0, dtype=torch.long), tensors)
    loss.backward()
    assert loss == 0
    assert not any(grad.any() for grad in gradients(tensors).values())


def test_extreme_logits_stay_finite():
    tensors, labels = make_tensors(torch.float64, (64,), bias=False), torch.randint(VOCAB, (64,))
    tensors["x"] *= 1e4
    plain = value_and_gradients(functools.partial(plain_loss, labels), tensors, torch.float64, ONE)
    assert_same(value_and_gradients(functools.partial(our_loss, 4, labels), tensors, torch.float64, ONE), plain)


@pytest.mark.parametrize("num_items", [1000, 1000.0, torch.tensor(1000), torch.tensor(1000.0)], ids=str)
def test_the_sum_is_divided_by_num_items_in_batch(num_items):
    tensors, labels = make_tensors(torch.float64, (2, 19)), make_labels((2, 19))
    plain, ours = (
        value_and_gradients(functools.partial(loss, labels, num_items_in_batch=num_items), tensors, torch.float64, ONE)
        for loss in (plain_loss, functools.partial(our_loss, 4))
    )
    assert_same(ours, plain)


def test_sum_then_divide_outside():
    """The incoming gradient scales the head's gradient as well, not only the hidden states'."""
    tensors, labels = make_tensors(torch.float64, (2, 19)), make_labels((2, 19))
    plain, ours = leaves(tensors), leaves(tensors)
    valid = (labels != -100).sum()
    plain_loss(labels, plain).backward()
    (our_loss(4, labels, ours, num_items_in_batch=1) / valid).backward()
    assert_same(gradients(ours), gradients(plain))


def test_accumulation_over_micro_batches_gives_the_gradient_of_one_large_batch():
    """Two micro-batches, of which the second has one valid label only."""
    tensors, labels = make_tensors(torch.float64, (2, 19)), make_labels((2, 19))
    labels[1, 1:] = -100
    labels[1, 0] = 3
    one, two = leaves(tensors), leaves(tensors)
    our_loss(4, labels, one).backward()
    for row in range(2):
        own = {**two, "x": two["x"][row : row + 1]}
        our_loss(3, labels[row : row + 1], own, num_items_in_batch=(labels != -100).sum()).backward()
    assert_same(gradients(two), gradients(one))


@pytest.mark.parametrize("num_items", [None, 10**6], ids=["mean", "per-step"])
def test_fp16_loss_scale(num_items):
    """A token's weight of 1e-6 is below fp16's range; scaled by 65536 its gradient is not, and must not be lost."""
    tensors, labels = make_tensors(torch.float16, (3, 507)), make_labels((3, 507))
    scale = torch.tensor(65536.0)
    truth, reference, ours = (
        value_and_gradients(functools.partial(loss, labels, num_items_in_batch=num_items), tensors, dtype, scale)
        for loss, dtype in (
            (plain_loss, torch.float64),
            (plain_loss, torch.float16),
            (functools.partial(our_loss, 64), torch.float16),
        )
    )
    assert_within_budget(ours, reference, truth)


def test_a_second_backward_through_a_retained_graph_gives_the_same():
    tensors, labels = leaves(make_tensors(torch.bfloat16, (2, 37))), make_labels((2, 37))
    loss = our_loss(4, labels, tensors)
    first = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(tensors.values()))
    assert all(map(torch.equal, first, second))


def test_a_second_derivative_is_refused_not_wrong():
    tensors = leaves(make_tensors(torch.float64, (5,)))
    loss = our_loss(2, torch.arange(5), tensors)
    (dx,) = torch.autograd.grad(loss.square(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(
    "frozen", [{"x"}, {"weight", "bias"}, {"weight"}, {"x", "weight"}], ids=["body", "head", "weight", "all-but-bias"]
)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_right_one(frozen):
    tensors, labels = make_tensors(torch.float64, (2, 19)), make_labels((2, 19))
    plain, ours = leaves(tensors, frozen=frozen), leaves(tensors, frozen=frozen)
    plain_loss(labels, plain).backward()
    our_loss(4, labels, ours).backward()
    assert {name for name in ours if ours[name].grad is None} == frozen
    trained = tensors.keys() - frozen
    assert_same({name: ours[name].grad for name in trained}, {name: plain[name].grad for name in trained})


def test_a_head_tied_to_the_embedding():
    torch.manual_seed(0)
    embedding = torch.randn(VOCAB, HIDDEN, dtype=torch.float64)
    ids, labels = torch.randint(VOCAB, (2, 37)), make_labels((2, 37))
    results = []
    for loss in (plain_loss, functools.partial(our_loss, 4)):
        weight = embedding.clone().requires_grad_()
        loss(labels, {"x": F.embedding(ids, weight).tanh(), "weight": weight}).backward()
        results.append({"weight": weight.grad})
    assert_same(results[1], results[0])


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(backward_inside):
    tensors, labels = make_tensors(torch.float32, (2, 507)), make_labels((2, 507))
    truth = value_and_gradients(functools.partial(plain_loss, labels), tensors, torch.float64, ONE)
    results = []
    for loss in (plain_loss, functools.partial(our_loss, 16)):
        own = leaves(tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(labels, own)
            if backward_inside:
                value.backward()
        if not backward_inside:
            value.backward()
        assert value.dtype == torch.float32
        assert all(grad.dtype == torch.float32 for grad in gradients(own).values())
        results.append({"output": value.detach(), **gradients(own)})
    assert_within_budget(results[1], results[0], truth)


@pytest.mark.parametrize(
    ("frozen", "grad_enabled", "products"),
    [
        ((), True, {(8, VOCAB): 1, (8, HIDDEN): 1, (VOCAB, HIDDEN): 1}),
        (("weight",), True, {(8, VOCAB): 1, (8, HIDDEN): 1}),
        (("x",), True, {(8, VOCAB): 1, (VOCAB, HIDDEN): 1}),
        (("x", "weight"), True, {(8, VOCAB): 1}),
        ((), False, {(8, VOCAB): 1}),
    ],
    ids=["all", "frozen-head", "frozen-body", "frozen-both", "no-grad"],
)
def test_only_gradients_that_are_needed_are_computed(frozen, grad_enabled, products):
    tensors = leaves(make_tensors(torch.float32, (32,), bias=False), frozen=frozen)
    with CountProducts() as counted, torch.set_grad_enabled(grad_enabled):
        loss = our_loss(4, torch.arange(32), tensors)
    assert counted.shapes == {shape: 4 * count for shape, count in products.items()}
    assert loss.requires_grad == (grad_enabled and len(frozen) < 2)


def test_a_forward_alone_leaves_no_gradient_behind_and_frees_what_it_computed():
    tensors, labels = leaves(make_tensors(torch.float32, (32,))), torch.arange(32)
    with LiveMemory() as memory:
        our_loss(4, labels, tensors)
        with torch.no_grad():
            our_loss(4, labels, tensors)
        assert memory.live == 0
    assert not any(grad is not None for grad in gradients(tensors).values())


def test_the_loss_is_the_same_with_and_without_gradients():
    tensors, labels = leaves(make_tensors(torch.bfloat16, (3, 37))), make_labels((3, 37))
    with torch.no_grad():
        without = our_loss(4, labels, tensors)
    assert torch.equal(our_loss(4, labels, tensors), without)


def test_inputs_are_not_written_to():
    tensors, labels = make_tensors(torch.float64, (2, 19)), make_labels((2, 19))
    before = {name: tensor.clone() for name, tensor in tensors.items()} | {"labels": labels.clone()}
    own = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    our_loss(4, labels, own).backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in {**own, "labels": labels}.items())


@pytest.mark.parametrize("chunks", [0, -2])
def test_less_than_one_chunk_is_refused(chunks):
    with pytest.raises(ValueError, match=f"chunks must be at least 1, got {chunks}"):
        our_loss(chunks, torch.arange(3), make_tensors(torch.float32, (3,)))


@pytest.mark.parametrize("shape", [(2, 18), (38,), (19, 2), (2, 19, 1)], ids=str)
def test_labels_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"labels must have the shape .*\(2, 19\).*, got " + re.escape(str(shape))):
        our_loss(2, torch.zeros(shape, dtype=torch.long), make_tensors(torch.float32, (2, 19)))


def test_a_label_outside_the_vocabulary_is_an_error():
    with pytest.raises(RuntimeError, match=f"index {VOCAB} is out of bounds"):
        our_loss(2, torch.tensor([0, VOCAB, 1]), make_tensors(torch.float32, (3,)))


def test_a_head_that_zero3_has_not_gathered_is_refused():
    tensors = make_tensors(torch.float32, (3,)) | {"weight": torch.empty(0)}
    with pytest.raises(ValueError, match="the LM head's weight has no elements: ZeRO-3 has not gathered it"):
        our_loss(2, torch.arange(3), tensors)


def measure(tokens, chunks, vocab):
    """Peak live bytes of the forward, what it holds, the backward's peak, and a forward without gradients."""
    x, weight = torch.ones(tokens, 256), torch.ones(vocab, 256)
    tensors, labels = leaves({"x": x, "weight": weight}), torch.zeros(tokens, dtype=torch.long)
    with LiveMemory() as memory:
        loss = our_loss(chunks, labels, tensors)
        forward, held = memory.peak, memory.live
        memory.reset_peak()
        loss.backward()
        backward = memory.peak
        for tensor in tensors.values():
            tensor.grad = None
        del loss
        memory.reset_peak()
        with torch.no_grad():
            our_loss(chunks, labels, tensors)
    return forward, held, backward, memory.peak


def test_peak_memory():
    with FakeTensorMode():
        peaks = measure(4096, 16, 32000)
        twice = measure(8192, 32, 32000)
    print(
        "chunked loss, MiB: forward {:.2f}, held {:.2f}, backward {:.2f}, no_grad {:.2f}".format(
            *(p / MIB for p in peaks)
        )
    )
    forward, held, backward, without_gradients = peaks
    # A chunk's logits and the head's gradient are 31.25 MiB each, the hidden states' gradient 4. Full: 1004, 504, 1504.
    assert forward <= 110 * MIB
    assert held <= 36 * MIB
    assert backward <= 71 * MIB
    assert without_gradients <= 64 * MIB
    # The chunks keep their size, so the hidden states' gradient of 4 MiB is what grows, and a few scalars per token.
    per_token = 4096 * 32
    assert all(more - once <= 4 * MIB + per_token for more, once in zip(twice[:2], peaks[:2], strict=True))
    assert twice[2] - backward <= 8 * MIB + per_token
    assert twice[3] - without_gradients <= per_token


def test_peak_memory_of_real_tensors_is_that_of_fake_ones():
    with FakeTensorMode():
        fake = measure(256, 4, 1000)
    assert measure(256, 4, 1000) == fake
