"""Several experts in one product, by torch's grouped product on the CPU."""

import functools

import pytest
import torch
import torch.nn.functional as F
from error_budget import assert_within_budget, gradients, leaves, value_and_gradients
from plain_experts import EXPERTS, VARIANTS, make_index, make_tensors, our_experts, plain_experts

from mst_ds.geometry import EXPERTS_OF_A_GRADIENT
from mst_ds.minisequence import experts
from mst_ds.minisequence.grouped import runs_of_experts


@pytest.fixture
def grouped(monkeypatch):
    """Several experts in one product, as on a GPU; for each how many."""
    groups, product = [], F.grouped_mm

    def counted(left, right, *, offs):
        groups.append(len(offs))
        return product(left, right, offs=offs)

    monkeypatch.setattr(experts, "has_grouped_products", lambda *tensors: True)
    monkeypatch.setattr(F, "grouped_mm", counted)
    return groups


@pytest.mark.parametrize("name", VARIANTS)
def test_error_budget_of_several_experts_at_a_time(grouped, name):
    """All in one product, or three after three where there are biases."""
    dtype, count = torch.bfloat16, 333 * EXPERTS
    of_tensors, settings = VARIANTS[name]
    tensors = make_tensors(dtype, count, **of_tensors)
    tensors["scores"], index = tensors["scores"][:, :1], torch.arange(count)[:, None] % EXPERTS
    grad_output = torch.randn_like(tensors["x"])
    plain = functools.partial(plain_experts, index, **settings)
    ours = functools.partial(our_experts, 1, index, **settings)
    truth = value_and_gradients(plain, tensors, torch.float64, grad_output)
    reference, candidate = (value_and_gradients(each, tensors, dtype, grad_output) for each in (plain, ours))
    assert set(grouped) == {3 if "up_bias" in tensors else 6}
    assert_within_budget(candidate, reference, truth)
    assert all(candidate[name].dtype == dtype for name in candidate)


def test_several_experts_at_a_time_and_numbers_that_name_none(grouped):
    """Frozen tensors, too: in fp32, where both ways round alike but for the order of sums."""
    tensors, index = make_tensors(torch.float32, 160, bias=False), make_index(160)
    index[::3, 0] = EXPERTS
    frozen = {"up", "scores"}
    plain, ours = (leaves(tensors, frozen=frozen) for _ in range(2))
    plain_experts(index, plain).square().sum().backward()
    our_experts(1, index, ours).square().sum().backward()
    assert max(grouped) > 1
    assert {name for name in ours if ours[name].grad is None} == frozen
    for name in tensors.keys() - frozen:
        torch.testing.assert_close(ours[name].grad, plain[name].grad, rtol=1e-4, atol=1e-5)


def test_weight_gradients_of_many_experts_take_several_products(grouped):
    """Each is beside those of all experts before it is put there."""
    count = EXPERTS_OF_A_GRADIENT + 3
    torch.manual_seed(0)
    up, down, x = torch.randn(count, 32, 16), torch.randn(count, 16, 16), torch.randn(4 * count, 16)
    index = torch.arange(4 * count)[:, None] % count
    results = []
    for chunks in (1, 10**6):  # all experts at a time, each by itself
        own = leaves({"x": x, "scores": torch.ones(4 * count, 1), "up": up, "down": down})
        our_experts(chunks, index, own).square().sum().backward()
        results.append(gradients(own))
    assert {EXPERTS_OF_A_GRADIENT, 3, count} == set(grouped)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "most", "runs"),
    [
        ([3, 4, 5], 12, [(0, 3)]),
        ([3, 4, 5], 8, [(0, 2), (2, 3)]),
        ([3, 0, 5, 1], 9, [(0, 1), (2, 4)]),
        ([0, 20, 1, 2], 8, [(1, 2), (2, 4)]),
        ([1, 1], 0, [(0, 1), (1, 2)]),
        ([0, 0], 8, []),
    ],
)
def test_runs_of_experts(sizes, most, runs):
    assert [(run.start, run.stop) for run in runs_of_experts(sizes, most)] == runs
