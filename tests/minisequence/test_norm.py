"""The chunked RMSNorm against the norms of transformers, and against float64."""

import functools

import pytest
import torch
from error_budget import assert_within_budget, relative_error, value_and_gradients
from torch.func import functional_call
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mst_ds.memory.live import LiveMemory
from mst_ds.minisequence.norm import chunked_rms_norm

WIDTH, EPSILON = 64, 1e-5
# The weight of Gemma's is counted from 1.
NORMS = {"llama": (LlamaRMSNorm, 0.0), "gemma": (GemmaRMSNorm, 1.0)}
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


def formula(offset, tensors):
    x, weight = tensors["x"], tensors["weight"]
    return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * (weight + offset)


def of_module(module, weight, x):
    return functional_call(module, {"weight": weight}, (x,))


def unchunked(module, tensors):
    return of_module(module, tensors["weight"], tensors["x"])


def chunked(module, offset, chunks, tensors):
    weight = tensors["weight"]
    function = functools.partial(of_module, module, weight)
    return chunked_rms_norm(
        tensors["x"], weight, function=function, epsilon=EPSILON, offset=offset, keeps_dtype=True, chunks=chunks
    )


@functools.cache
def case(kind, dtype, shape):
    """The module, its tensors, the gradient of its output; truth and reference."""
    norm, offset = NORMS[kind]
    torch.manual_seed(0)
    # Tokens as small as epsilon's root, and large ones.
    size = torch.logspace(-3, 2, shape[0] * shape[1])[torch.randperm(shape[0] * shape[1])].view(*shape, 1)
    x = (torch.randn(*shape, WIDTH) * size).to(dtype)
    weight = (torch.randn(WIDTH) * 0.3 + 1 - offset).to(dtype)
    # Along the output in part: what is subtracted in the backward is then not small.
    grad_output = (torch.randn(*shape, WIDTH) + x.sign()).to(dtype)
    module, tensors = norm(WIDTH, eps=EPSILON).to(dtype), {"x": x, "weight": weight}
    truth = value_and_gradients(functools.partial(formula, offset), tensors, torch.float64, grad_output)
    reference = value_and_gradients(functools.partial(unchunked, module), tensors, dtype, grad_output)
    return module, tensors, grad_output, truth, reference


@pytest.mark.parametrize("chunks", [1, 64])
@pytest.mark.parametrize("shape", [(3, 507), (1, 1021)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
def test_forward_is_the_models_own_and_gradients_are_within_the_budget(kind, dtype, shape, chunks):
    module, tensors, grad_output, truth, reference = case(kind, dtype, shape)
    function = functools.partial(chunked, module, NORMS[kind][1], chunks)
    candidate = value_and_gradients(function, tensors, dtype, grad_output)
    assert torch.equal(candidate["output"], reference["output"])
    assert_within_budget(candidate, reference, truth)
    assert all(candidate[name].dtype == reference[name].dtype for name in candidate)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("chunks", [1, 4])
def test_gradients_in_fp64(kind, chunks):
    module, tensors, grad_output, truth, _ = case(kind, torch.float32, (3, 507))
    # The model's own forward is in fp32 and gives only the output; the backward is in fp64.
    function = functools.partial(chunked, module.double(), NORMS[kind][1], chunks)
    found = value_and_gradients(function, tensors, torch.float64, grad_output)
    for name in ("x", "weight"):
        assert relative_error(found[name], truth[name]) < 1e-14, name
    module.float()


def test_bf16_error_does_not_grow_with_the_number_of_chunks():
    module, tensors, grad_output, truth, _ = case("llama", torch.bfloat16, (1, 1021))
    errors = []
    for chunks in (1, 64, 255):
        function = functools.partial(chunked, module, 0.0, chunks)
        found = value_and_gradients(function, tensors, torch.bfloat16, grad_output)
        errors.append(relative_error(found["weight"], truth["weight"]))
    assert max(errors) <= 1.05 * errors[0]


def test_heads_that_are_normed_transposed():
    """As Gemma 3 does: what comes and goes lies as it did, so that nothing is copied to have tokens in rows."""
    module, tensors, grad_output, truth, reference = case("llama", torch.float32, (3, 507))
    heads = tensors["x"].unflatten(-1, (1, -1)).transpose(1, 2)
    gradient = grad_output.unflatten(-1, (1, -1)).transpose(1, 2)
    turned = {**tensors, "x": heads.transpose(0, 2)}
    found = value_and_gradients(
        functools.partial(chunked, module, 0.0, 4), turned, torch.float32, gradient.transpose(0, 2)
    )
    for name in ("x", "output"):
        assert found[name].stride() == turned["x"].stride()
        found[name] = found[name].transpose(0, 2).transpose(1, 2).flatten(2)
    assert_within_budget(found, reference, truth)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_needs_no_gradient_gets_none(frozen):
    module, tensors, grad_output, _, reference = case("llama", torch.float32, (1, 507))
    leaves = {name: tensor.clone().requires_grad_(name != frozen) for name, tensor in tensors.items()}
    chunked(module, 0.0, 4, leaves).backward(grad_output)
    assert leaves.pop(frozen).grad is None
    ((name, leaf),) = leaves.items()
    assert relative_error(leaf.grad, reference[name].double()) < 1e-6


def test_output_may_be_written_to():
    module, tensors, _, _, reference = case("llama", torch.float32, (1, 507))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    output = chunked(module, 0.0, 4, leaves)
    output.mul_(2)
    output.sum().backward()
    assert torch.equal(output, 2 * reference["output"])


def test_a_weight_that_is_not_gathered_is_refused():
    with pytest.raises(ValueError, match="a norm's weight has no elements"):
        chunked_rms_norm(
            torch.ones(4, 8), torch.empty(0), function=torch.sin, epsilon=1e-6, offset=0.0, keeps_dtype=True, chunks=1
        )


@pytest.mark.parametrize("kind", NORMS)
def test_no_fp32_copy_of_the_shard_is_alive(kind):
    shape, chunks = (1, 4096), 64
    norm, offset = NORMS[kind]
    module = norm(WIDTH, eps=EPSILON).bfloat16()
    x = torch.randn(*shape, WIDTH, dtype=torch.bfloat16).requires_grad_()
    weight = torch.ones(WIDTH, dtype=torch.bfloat16).requires_grad_()
    tensor = x.numel() * x.itemsize
    # A chunk's own: no more than ten copies in fp32, and the weight's.
    slack = 10 * 2 * tensor // chunks + 8 * 8 * WIDTH
    with LiveMemory() as memory:
        output = chunked(module, offset, chunks, {"x": x, "weight": weight})
        assert memory.live == tensor  # the output; what is kept for the backward was there before
        assert memory.peak <= tensor + slack
        grad_output = torch.ones_like(output)
        memory.reset_peak()
        output.backward(grad_output)
        assert memory.peak <= 3 * tensor + slack  # output, its gradient, the input's
