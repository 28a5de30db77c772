"""A kept graph gives the gradients of the function, and keeps neither its inputs nor its output."""

import gc
import weakref

import pytest
import torch
from torch.nn.functional import dropout, scaled_dot_product_attention

from mst_ds.memory.live import LiveMemory
from mst_ds.recompute import KeptGraph, KeptOnDevice

SHAPE = (2, 4, 64, 16)


def flash(query, key, value):
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def grouped(query, key, value):
    return scaled_dot_product_attention(query, key[:, :2], value[:, 2:], is_causal=True, enable_gqa=True)


def by_hand(query, key, value):
    return (query @ key.transpose(2, 3)).softmax(-1) @ value


def with_dropout(query, key, value):
    return dropout(by_hand(query, key, value), 0.3) * value


def of_parts(query, key, value):
    # Parts of an input, each with a layout and an offset of its own; inputs and outputs of one memory.
    left, right = query.transpose(1, 2).chunk(2, dim=-1)
    return torch.cat([left * key[..., 8:].transpose(1, 2), right.sin()], dim=-1).exp() * value.transpose(1, 2)


def part_of_what_is_made(query, key, value):
    # The output is a view of what a kernel saved.
    return (query * key * value).exp()[:, 1:3]


FUNCTIONS = [flash, grouped, by_hand, with_dropout, of_parts, part_of_what_is_made]


def expected_of(function, inputs, grad_of):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    torch.manual_seed(3)
    output = function(*leaves)
    output.backward(grad_of(output))
    return output.detach(), [leaf.grad for leaf in leaves]


def random_inputs(dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(SHAPE, dtype=dtype) for _ in range(3)]


def random_like(output):
    return torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients(function):
    inputs = random_inputs()
    expected, grads = expected_of(function, inputs, random_like)
    torch.manual_seed(3)
    graph = KeptGraph(function, inputs, KeptOnDevice)
    output = graph.take_output()
    assert torch.equal(output, expected)
    found = graph.backward([tensor.clone() for tensor in inputs], output.clone(), random_like(output))
    for actual, wanted in zip(found, grads, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_inputs_and_output_may_come_back_in_another_layout(function):
    inputs = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in random_inputs()]
    expected, grads = expected_of(function, inputs, random_like)
    torch.manual_seed(3)
    graph = KeptGraph(function, inputs, KeptOnDevice)
    output = graph.take_output()
    turned = output.transpose(1, 2).contiguous().transpose(1, 2)
    # As part of a larger tensor, at an offset.
    again = [torch.stack([tensor.contiguous()] * 2)[1] for tensor in inputs]
    found = graph.backward(again, turned, random_like(output))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-14)
    for actual, wanted in zip(found, grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-14)


def test_an_input_that_is_not_used_has_no_gradient():
    inputs = random_inputs()
    graph = KeptGraph(lambda query, key, value: query * value, inputs, KeptOnDevice)
    output = graph.take_output()
    assert graph.backward(inputs, output, output)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_attention_only_the_log_sum_exp_is_kept(dtype):
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return KeptOnDevice(tensor)

    inputs = random_inputs(dtype)
    graph = KeptGraph(flash, inputs, keep)
    assert not kept  # before the output is known
    graph.take_output()
    # One fp32 number for each query of each head; else a seed or the like.
    assert sorted(tensor.numel() for tensor in kept)[-1] == inputs[0].numel() // SHAPE[-1]
    assert sum(tensor.nbytes for tensor in kept) <= inputs[0].numel() // SHAPE[-1] * 4 + 64


def test_memory_that_several_saved_tensors_share_is_kept_once():
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return KeptOnDevice(tensor)

    def function(query, key, value):
        made = query + key
        return (made[:1] * made[1:]).exp() * made[:1]

    inputs = random_inputs()
    expected, grads = expected_of(function, inputs, random_like)
    graph = KeptGraph(function, inputs, keep)
    output = graph.take_output()
    assert torch.equal(output, expected)
    # `made`, and what exp gave: nothing else was made.
    assert sorted(tensor.numel() for tensor in kept) == [inputs[0].numel() // 2, inputs[0].numel()]
    for actual, wanted in zip(graph.backward(inputs, output, random_like(output)), grads, strict=True):
        assert (actual is None and wanted is None) or torch.equal(actual, wanted)


@pytest.mark.parametrize("ends", ["in a backward", "without one"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_is_held_longer(function, ends):
    gc.disable()
    try:
        inputs = random_inputs()
        with LiveMemory() as memory:
            graph = KeptGraph(function, inputs, KeptOnDevice)
            watched = [weakref.ref(tensor.untyped_storage()) for tensor in inputs]
            again = [tensor.clone() for tensor in inputs]
            del inputs
            assert not any(reference() for reference in watched)
            output = graph.take_output()
            if ends == "in a backward":
                grads = graph.backward(again, output, random_like(output))
                del again, output, grads
                assert memory.live == 0  # though the graph is still there
            else:
                del again, output, graph
                assert memory.live == 0
    finally:
        gc.enable()


def test_a_second_backward_is_refused():
    inputs = random_inputs()
    graph = KeptGraph(flash, inputs, KeptOnDevice)
    output = graph.take_output()
    graph.backward(inputs, output, output)
    with pytest.raises(RuntimeError, match="attention cannot be differentiated a second time"):
        graph.backward(inputs, output, output)
