"""The operators with their fused kernels, in Triton's interpreter, against plain torch; `test_fused` runs this file.

In fp16: the interpreter cuts bf16 off where a GPU rounds to nearest, and kernels do the same for both.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from error_budget import assert_within_budget, gradients, leaves, relative_error, value_and_gradients
from plain_loss import ONE, make_labels, plain_log_probs, plain_loss
from plain_loss import make_tensors as loss_tensors
from plain_mlp import make_tensors as mlp_tensors
from plain_mlp import our_mlp, plain_mlp, stored
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mst_ds.minisequence import (
    chunked_log_probs,
    chunked_log_probs_of_head,
    chunked_loss,
    chunked_loss_of_head,
    chunked_rms_norm,
    rotary_embedding,
)
from mst_ds.minisequence.fused import cross_entropy, norm, rotary, swiglu

EPSILON, HALF = 1e-5, torch.float16


class OwnOperators(TorchDispatchMode):
    """Counts the fused kernels that run within, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mst_ds":
            self.names.append(func.name().removeprefix("mst_ds::"))
        return func(*args, **(kwargs or {}))


def assert_budget_with_kernels(names, ours, plain, tensors, grad_output, formula=None):
    """Every kernel of `names` runs, and nothing is further from float64 than `plain` is in fp16."""
    truth = value_and_gradients(formula or plain, tensors, torch.float64, grad_output)
    reference = value_and_gradients(plain, tensors, HALF, grad_output)
    with OwnOperators() as operators:
        candidate = value_and_gradients(ours, tensors, HALF, grad_output)
    assert set(operators.names) == names
    assert_within_budget(candidate, reference, truth)
    assert all(candidate[name].dtype == reference[name].dtype for name in candidate)


def norm_case(kind, shape, width):
    cls, offset = {"llama": (LlamaRMSNorm, 0.0), "gemma": (GemmaRMSNorm, 1.0)}[kind]
    torch.manual_seed(0)
    tokens = shape[0] * shape[1]
    # As small as epsilon's root, and large.
    size = torch.logspace(-3, 2, tokens)[torch.randperm(tokens)].view(*shape, 1)
    x = (torch.randn(*shape, width) * size).to(HALF)
    tensors = {"x": x, "weight": (torch.randn(width) * 0.3 + 1 - offset).to(HALF)}
    # Along the output in part: what is subtracted in the backward is then not small.
    grad_output = (torch.randn(*shape, width) + x.sign()).to(HALF)

    def formula(leaves):
        x = leaves["x"]
        return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * (leaves["weight"] + offset)

    def plain(leaves):
        return torch.func.functional_call(cls(width, eps=EPSILON), {"weight": leaves["weight"]}, (leaves["x"],))

    def ours(leaves):
        return chunked_rms_norm(
            leaves["x"],
            leaves["weight"],
            function=torch.sin,
            epsilon=EPSILON,
            offset=offset,
            keeps_dtype=True,
            chunks=2,
        )

    return ours, plain, tensors, grad_output, formula


# Several parts of a weight's gradient, the last one not full; columns and rows that no power of two divides; one token.
@pytest.mark.parametrize(
    ("kind", "shape", "width"),
    [("llama", (3, 1021), 64), ("gemma", (3, 7), 1000), ("llama", (1, 1), 5), ("llama", (1, 19), 4097)],
)
def test_rms_norm(kind, shape, width):
    ours, plain, tensors, grad_output, formula = norm_case(kind, shape, width)
    assert_budget_with_kernels({"rms_norm", "rms_norm_backward"}, ours, plain, tensors, grad_output, formula)


def test_rms_norm_of_many_slices_and_of_rows_apart(monkeypatch):
    monkeypatch.setattr(norm, "ELEMENTS_AT_ONCE", 2**14)
    ours, plain, tensors, grad_output, formula = norm_case("llama", (3, 507), 48)
    wide = torch.cat([tensors["x"], tensors["x"]], dim=-1)
    ways = [lambda leaves, way=way: way({**leaves, "x": leaves["x"][..., 48:]}) for way in (ours, plain, formula)]
    assert_budget_with_kernels(
        {"rms_norm", "rms_norm_backward"}, *ways[:2], {**tensors, "x": wide}, grad_output, ways[2]
    )


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_rms_norm_gives_what_is_frozen_no_gradient(frozen):
    ours, _, tensors, grad_output, _ = norm_case("llama", (1, 37), 48)
    expected = value_and_gradients(ours, tensors, HALF, grad_output)
    own = leaves(tensors, frozen={frozen})
    ours(own).backward(grad_output)
    assert own.pop(frozen).grad is None
    ((name, leaf),) = own.items()
    assert torch.equal(leaf.grad, expected[name])


@pytest.mark.parametrize("width", [16, 6], ids=["all dimensions", "some"])
@pytest.mark.parametrize("rows_of_angles", [2, 1])
@pytest.mark.parametrize("is_view", [True, False])
def test_rotary_embedding(width, rows_of_angles, is_view):
    torch.manual_seed(0)
    batch, heads, length, dim = 2, 3, 307, 16
    x = torch.randn(batch, length, heads, dim, dtype=HALF).transpose(1, 2)
    if not is_view:
        x = x.contiguous()
    # Independent of each other, and in both halves.
    cos, sin = torch.randn(2, rows_of_angles, length, width, dtype=HALF)

    def with_angles(function, leaves):
        dtype = leaves["x"].dtype
        return function(leaves["x"], cos.to(dtype), sin.to(dtype))

    plain = functools.partial(with_angles, lambda x, cos, sin: apply_rotary_pos_emb(x, x, cos, sin)[0])
    ours = functools.partial(with_angles, rotary_embedding)
    assert_budget_with_kernels({"rotary"}, ours, plain, {"x": x}, torch.randn_like(x))
    assert ours({"x": x}).stride() == x.stride()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("gate_in_up", [False, True])
def test_mlp(gate_in_up, keep):
    tensors = mlp_tensors(HALF, (3, 101), hidden=48, intermediate=77)
    grad_output = torch.randn_like(tensors["x"])

    def ours(leaves):
        return our_mlp(4, stored(leaves, gate_in_up=gate_in_up, transposed=False), gate_in_up=gate_in_up, keep=keep)

    assert_budget_with_kernels({"silu_product", "silu_product_backward"}, ours, plain_mlp, tensors, grad_output)


def test_mlp_keeps_what_a_second_backward_reads():
    own = leaves(mlp_tensors(HALF, (2, 37), hidden=16, intermediate=40))
    loss = our_mlp(4, own, torch.nn.SiLU(), is_silu=True, keep=True).square().mean()
    with OwnOperators() as operators:
        first = torch.autograd.grad(loss, list(own.values()), retain_graph=True)
        second = torch.autograd.grad(loss, list(own.values()))
    assert set(operators.names) == {"silu_product", "silu_product_backward"}
    assert all(map(torch.equal, first, second))


def test_another_activation_is_torchs():
    own = leaves(mlp_tensors(HALF, (2, 37), hidden=16, intermediate=40))
    with OwnOperators() as operators:
        our_mlp(4, own, F.gelu).sum().backward()
    assert not operators.names


def of_head(leaves, labels, **settings):
    def head(x):
        return F.linear(x, leaves["weight"], leaves.get("bias"))

    parameters = [leaves[name] for name in leaves if name != "x"]
    return chunked_loss_of_head(head, leaves["x"], parameters, labels, **settings)


def of_weight(leaves, labels, **settings):
    return chunked_loss(leaves["x"], leaves["weight"], labels, bias=leaves.get("bias"), **settings)


@pytest.mark.parametrize(
    ("loss", "bias", "scale"), [(of_weight, True, 1.0), (of_weight, False, 0.4), (of_head, True, 0.4)]
)
def test_loss(monkeypatch, loss, scale, bias):
    # Two tiles, the second not full.
    monkeypatch.setattr(cross_entropy, "COLUMNS_OF_TILE", 256)
    shape = (3, 37)
    tensors, labels = loss_tensors(HALF, shape, bias=bias), make_labels(shape)
    plain = functools.partial(plain_loss, labels, logit_scale=scale)
    ours = functools.partial(loss, labels=labels, logit_scale=scale, chunks=4)
    assert_budget_with_kernels({"cross_entropy_"}, ours, plain, tensors, ONE)


@pytest.mark.parametrize("is_of_head", [False, True])
def test_log_probs(monkeypatch, is_of_head):
    """Each token's gradient has a factor of its own; a temperature is part of the kernel's scale."""
    monkeypatch.setattr(cross_entropy, "COLUMNS_OF_TILE", 256)
    shape = (3, 37)
    tensors, labels = loss_tensors(HALF, shape), make_labels(shape)
    settings = {"logit_scale": 0.4, "temperature": 0.5}

    def ours(own):
        if not is_of_head:
            return chunked_log_probs(own["x"], own["weight"], labels, chunks=4, bias=own["bias"], **settings)
        parameters = [own["weight"], own["bias"]]
        head = functools.partial(F.linear, weight=own["weight"], bias=own["bias"])
        return chunked_log_probs_of_head(head, own["x"], parameters, labels, chunks=4, **settings)

    plain = functools.partial(plain_log_probs, labels, **settings)
    assert_budget_with_kernels({"cross_entropy_"}, ours, plain, tensors, torch.randn(shape))


def test_loss_of_logits_that_are_minus_infinity_of_ignored_tokens_and_without_gradients(monkeypatch):
    monkeypatch.setattr(cross_entropy, "COLUMNS_OF_TILE", 64)
    logits, labels = torch.randn(7, 150).to(HALF), torch.randint(70, 150, (7,))
    logits[:, :70] = float("-inf")
    labels[2] = 7
    losses, factor = torch.empty(7), torch.tensor(0.5)
    truth = logits.double().requires_grad_()
    expected = F.cross_entropy(truth, labels, ignore_index=7, reduction="none")
    expected.sum().mul(0.5).backward()
    before = logits.clone()
    cross_entropy.cross_entropy_(logits, labels, factor, losses, 7, 1.0, False)
    torch.testing.assert_close(losses, expected.float())
    assert torch.equal(logits, before)
    cross_entropy.cross_entropy_(logits, labels, factor, losses, 7, 1.0, True)
    torch.testing.assert_close(logits, truth.grad.to(HALF))
    assert losses[2] == 0
    assert not logits[2].any()
    labels[3] = 150
    # Nor does anybody train on a label that there is not.
    cross_entropy.cross_entropy_(before, labels, factor, losses, 7, 1.0, True)
    assert losses.isnan().tolist() == [False, False, False, True, False, False, False]
    assert before.isnan().all(dim=1).tolist() == losses.isnan().tolist()


def test_a_capped_loss_is_torchs():
    own, labels = leaves(loss_tensors(HALF, (2, 19))), make_labels((2, 19))
    with OwnOperators() as operators:
        of_weight(own, labels, chunks=4, logit_softcap=30.0).backward()
    assert not operators.names


def test_bf16_is_within_one_unit_in_the_last_place():
    torch.manual_seed(0)
    gate, up, grad = torch.randn(3, 4099).bfloat16()
    own = {"gate": gate.double().requires_grad_(), "up": up.double().requires_grad_()}
    expected = F.silu(own["gate"]) * own["up"]
    expected.backward(grad.double())
    swiglu.product(gate, up, out := torch.empty_like(gate))
    swiglu.backward(gate, up, grad, gate, up)
    x, cos, sin = torch.randn(1, 2, 33, 8).bfloat16(), *torch.randn(2, 1, 33, 8).bfloat16()
    rotary.rotate(x, cos, sin, turned := torch.empty_like(x), False)
    pairs = [(out, expected.detach()), *zip((gate, up), gradients(own).values(), strict=True)]
    pairs.append((turned, apply_rotary_pos_emb(x.double(), x.double(), cos.double(), sin.double())[0]))
    for found, truth in pairs:
        # fp32 cancels where terms do.
        assert ((found.double() - truth).abs() <= 2**-7 * truth.abs() + 1e-6).all()
        assert relative_error(found, truth) > 0


# The last one is of a norm that returns another dtype.
@pytest.mark.parametrize(
    ("dtypes", "keeps_dtype"),
    [
        ((torch.float32, torch.float32), True),
        ((torch.float64, torch.float64), True),
        ((torch.bfloat16, torch.float32), True),
        ((torch.bfloat16, torch.bfloat16), False),
    ],
)
def test_other_dtypes_are_torchs(dtypes, keeps_dtype):
    x, weight = (
        torch.ones(shape).to(dtype).requires_grad_() for shape, dtype in zip(((8, 8), (8,)), dtypes, strict=True)
    )
    settings = {"epsilon": EPSILON, "offset": 0.0, "keeps_dtype": keeps_dtype, "chunks": 1}
    with OwnOperators() as operators:
        chunked_rms_norm(x, weight, function=lambda x: x * weight, **settings).sum().backward()
    assert not operators.names
