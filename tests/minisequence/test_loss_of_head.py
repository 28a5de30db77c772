"""The chunked loss of a head that is more than a weight and a bias."""

import functools

import pytest
import torch
import torch.nn.functional as F
from error_budget import (
    assert_equal_but_for_order,
    assert_within_budget,
    gradients,
    leaves,
    value_and_gradients,
)
from plain_loss import HIDDEN, ONE, VOCAB, make_labels, make_tensors, plain_loss
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations

from mst_ds.memory.live import LiveMemory
from mst_ds.minisequence import chunked_loss, chunked_loss_of_head

RANK = 8
LONG = (3, 1021)


class AdaptedHead(nn.Module):
    """A frozen or trained head with a low-rank adapter beside it, as peft builds it."""

    def __init__(self, dtype=torch.float64, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.a, self.b = nn.Linear(HIDDEN, RANK, bias=False), nn.Linear(RANK, VOCAB, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.b.weight, std=0.1)
        self.to(dtype)

    def forward(self, x):
        return self.base(x) + 2 * self.b(self.a(self.dropout(x)))


class NormedHead(nn.Module):
    """A head with a norm before it and a scale and a bias behind it: not all its parameters belong to linear layers."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(HIDDEN)
        self.linear = nn.Linear(HIDDEN, VOCAB)
        self.scale = nn.Parameter(torch.rand(VOCAB) + 0.5)
        self.to(dtype)

    def forward(self, x):
        return self.linear(self.norm(x)) * self.scale


def weight_normed_head():
    torch.manual_seed(0)
    return parametrizations.weight_norm(nn.Linear(HIDDEN, VOCAB)).double()


HEADS = {"adapted": AdaptedHead, "normed": NormedHead, "weight norm": weight_normed_head}
assert_same = functools.partial(assert_equal_but_for_order, atol=1e-14)


def plain_loss_of(head, x, labels, **kwargs):
    logits = head(x)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **kwargs)


def step_of_head(loss, head, x):
    """By name; those of what is frozen are left out."""
    head.zero_grad()
    x = x.detach().clone().requires_grad_(x.requires_grad)
    value = loss(x)
    value.backward()
    named = {"x": x, **dict(head.named_parameters())}
    return {"loss": value.detach(), **{name: tensor.grad for name, tensor in named.items() if tensor.requires_grad}}


def our_loss_of(head, labels, chunks, **kwargs):
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return lambda x: chunked_loss_of_head(head, x, trained, labels, chunks=chunks, **kwargs)


def hidden_states(dtype=torch.float64, shape=(2, 37)):
    torch.manual_seed(1)
    return torch.randn(*shape, HIDDEN).to(dtype).requires_grad_(), make_labels(shape)


@pytest.mark.parametrize("chunks", [1, 5, 100])
@pytest.mark.parametrize("name", HEADS)
def test_values_and_every_gradient(name, chunks):
    head, (x, labels) = HEADS[name](), hidden_states()
    plain = step_of_head(lambda x: plain_loss_of(head, x, labels), head, x)
    assert_same(step_of_head(our_loss_of(head, labels, chunks), head, x), plain)


def test_a_plain_head_gives_what_chunked_loss_gives():
    tensors, labels = make_tensors(torch.float32, (2, 37)), make_labels((2, 37))
    settings = {"chunks": 5, "num_items_in_batch": 100, "logit_scale": 0.5, "logit_softcap": 4.0}
    results = []
    for of_head in (False, True):
        own = leaves(tensors)
        if of_head:
            parameters = [own["weight"], own["bias"]]
            loss = chunked_loss_of_head(
                lambda x, p=parameters: F.linear(x, *p), own["x"], parameters, labels, **settings
            )
        else:
            loss = chunked_loss(own["x"], own["weight"], labels, bias=own["bias"], **settings)
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(own)})
    # The head rounds the gradient of the bias to its dtype no earlier, so even fp32 results agree in every bit but the
    # last.
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "trained",
    [{"a", "b"}, {"base"}, {"a"}, {"x"}, {"x", "a", "b"}, {"x", "base", "a", "b"}],
    ids=lambda names: "-".join(sorted(names)),
)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_right_one(trained):
    head, (x, labels) = AdaptedHead(), hidden_states()
    for name, module in head.named_children():
        module.requires_grad_(name in trained)
    x.requires_grad_("x" in trained)
    plain = step_of_head(lambda x: plain_loss_of(head, x, labels), head, x)
    ours = step_of_head(our_loss_of(head, labels, 5), head, x)
    assert len(ours) == 1 + len(trained)
    assert_same(ours, plain)


def test_a_trained_bias_on_a_frozen_weight():
    head, (x, labels) = NormedHead(), hidden_states()
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name == "linear.bias")
    plain = step_of_head(lambda x: plain_loss_of(head, x, labels), head, x)
    assert_same(step_of_head(our_loss_of(head, labels, 5), head, x), plain)


def test_parameters_that_the_head_does_not_use_get_zero():
    """As those of an adapter that is switched off; also where nothing else is trained."""
    head, (x, labels) = AdaptedHead(), hidden_states()
    base = head.base.requires_grad_(False)
    for needs_x in (True, False):
        x.requires_grad_(needs_x)
        trained = [head.a.weight, head.b.weight]
        results = step_of_head(
            lambda x, trained=trained: chunked_loss_of_head(base, x, trained, labels, chunks=3), head, x
        )
        assert not results["a.weight"].any()
        assert not results["b.weight"].any()
        assert results["loss"] > 0
        assert ("x" in results) == needs_x


def test_a_weight_used_twice_gets_both_gradients():
    torch.manual_seed(0)
    weight, (x, labels) = nn.Parameter(torch.randn(HIDDEN, HIDDEN, dtype=torch.float64) / HIDDEN), hidden_states()
    labels = labels.clamp(max=HIDDEN - 1)
    head = nn.ParameterList([weight])

    def forward(x):
        return F.linear(torch.tanh(F.linear(x, weight)), weight) + weight.sum(0)

    plain = step_of_head(lambda x: plain_loss_of(forward, x, labels), head, x)
    ours = step_of_head(lambda x: chunked_loss_of_head(forward, x, [weight], labels, chunks=5), head, x)
    assert_same(ours, plain)


def test_dropout_draws_once_and_the_gradient_has_the_same_mask():
    head, (x, labels) = AdaptedHead(dropout=0.5), hidden_states()
    rows = [slice(0, 15), slice(15, 30), slice(30, 45), slice(45, 60), slice(60, 74)]

    def in_chunks(x):
        # The plain head, over the same chunks in the same order.
        logits = torch.cat([head(x.flatten(0, 1)[None, part])[0] for part in rows])
        return F.cross_entropy(logits, labels.flatten())

    results, states = [], []
    for loss in (in_chunks, our_loss_of(head, labels, 5)):
        torch.manual_seed(7)
        results.append(step_of_head(loss, head, x))
        states.append(torch.get_rng_state())
    assert_same(results[1], results[0])
    assert torch.equal(*states)


@functools.cache
def bf16_cases():
    head, (x, labels) = AdaptedHead(torch.bfloat16), hidden_states(torch.bfloat16, LONG)
    exact = AdaptedHead(torch.float64)
    exact.load_state_dict(head.state_dict())
    truth = step_of_head(lambda x: plain_loss_of(exact, x, labels), exact, x.detach().double().requires_grad_())
    return head, x, labels, truth, step_of_head(lambda x: plain_loss_of(head, x, labels), head, x)


@pytest.mark.parametrize("chunks", [4, 256])
def test_error_budget_in_bf16_of_a_plain_head(chunks):
    tensors, labels = make_tensors(torch.bfloat16, LONG), make_labels(LONG)
    plain = functools.partial(plain_loss, labels)
    truth, reference = (value_and_gradients(plain, tensors, dtype, ONE) for dtype in (torch.float64, torch.bfloat16))

    def ours(own):
        parameters = [own["weight"], own["bias"]]
        return chunked_loss_of_head(lambda x: F.linear(x, *parameters), own["x"], parameters, labels, chunks=chunks)

    assert_within_budget(value_and_gradients(ours, tensors, torch.bfloat16, ONE), reference, truth)


@pytest.mark.parametrize("chunks", [4, 256])
def test_error_budget_in_bf16_of_an_adapted_head(chunks):
    head, x, labels, truth, reference = bf16_cases()
    assert_within_budget(step_of_head(our_loss_of(head, labels, chunks), head, x), reference, truth)


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(backward_inside):
    head, (x, labels) = AdaptedHead(torch.float32), hidden_states(torch.float32, (2, 507))
    exact = AdaptedHead(torch.float64)
    exact.load_state_dict(head.state_dict())
    truth = step_of_head(lambda x: plain_loss_of(exact, x, labels), exact, x.detach().double().requires_grad_())
    results = []
    for loss in (lambda x: plain_loss_of(head, x, labels), our_loss_of(head, labels, 16)):
        head.zero_grad()
        x.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(x)
            if backward_inside:
                value.backward()
        if not backward_inside:
            value.backward()
        grads = {"x": x.grad, **{name: parameter.grad for name, parameter in head.named_parameters()}}
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        results.append({"loss": value.detach(), **grads})
    assert_within_budget(results[1], results[0], truth)


def test_under_no_grad_there_is_a_loss_and_nothing_else():
    head, (x, labels) = AdaptedHead(), hidden_states()
    expected = our_loss_of(head, labels, 4)(x).detach()
    with torch.no_grad(), LiveMemory() as memory:
        loss = our_loss_of(head, labels, 4)(x)
        assert memory.live == loss.nbytes
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    assert all(parameter.grad is None for parameter in head.parameters())


def test_a_second_backward_through_a_retained_graph_gives_the_same():
    head, (x, labels) = AdaptedHead(torch.bfloat16), hidden_states(torch.bfloat16)
    loss = our_loss_of(head, labels, 4)(x)
    wanted = [x, *head.parameters()]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, wanted)))


def test_a_second_derivative_is_refused_not_wrong():
    head, (x, labels) = AdaptedHead(), hidden_states()
    (dx,) = torch.autograd.grad(our_loss_of(head, labels, 4)(x).square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_head_that_returns_what_autograd_needs_again():
    """The logits are written over in place: not the head's own output, which a tanh keeps for its derivative."""
    head, (x, labels) = NormedHead(), hidden_states()

    def forward(x):
        return torch.tanh(head(x))

    plain = step_of_head(lambda x: plain_loss_of(forward, x, labels), head, x)
    trained = list(head.parameters())
    ours = step_of_head(lambda x: chunked_loss_of_head(forward, x, trained, labels, chunks=3), head, x)
    assert_same(ours, plain)


def test_peak_memory_is_that_of_one_chunk():
    """Logits of 256 x 32000, in fp32: those of the head, the copy that becomes their gradient, and few columns."""
    with FakeTensorMode(), LiveMemory() as memory:
        head = nn.Linear(256, 32000, bias=False)
        x, labels = torch.ones(4096, 256, requires_grad=True), torch.zeros(4096, dtype=torch.long)
        before = memory.live
        memory.reset_peak()
        chunked_loss_of_head(head, x, [head.weight], labels, chunks=16)
    logits, d_weight, d_x = 256 * 32000 * 4, 32000 * 256 * 4, x.nbytes
    print(f"{(memory.peak - before) / 2**20:.2f} MiB")
    assert memory.peak - before <= 2 * logits + d_weight + d_x + 2**20


def test_a_head_that_zero3_has_not_gathered_is_refused():
    head, (x, labels) = AdaptedHead(), hidden_states()
    with pytest.raises(ValueError, match="a parameter of the LM head has no elements: ZeRO-3 has not gathered it"):
        chunked_loss_of_head(head, x, [torch.empty(0)], labels, chunks=2)
