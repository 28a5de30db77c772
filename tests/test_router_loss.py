"""The router loss of a mixture of experts: transformers', also on shards and over micro-batches."""

import pytest
import torch
from plain_model import TOLERANCE, assert_close, loss_and_gradients, shift
from sharded import sharded_loss_and_gradients
from tiny import tiny_settings
from tiny_models import ARCHITECTURES, build, tiny_model
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mst_ds import apply_settings
from mst_ds.minisequence.router_loss import router_loss
from mst_ds.sequence_parallel import run_simulated

MIXTURES = ["mixtral", "qwen3-moe", "olmoe", "gpt-oss"]
LENGTH = 30


def router_logits(tokens, layers=3, experts=5):
    torch.manual_seed(0)
    # Some experts are far more popular than others.
    bias = torch.linspace(0, 2, experts, dtype=torch.float64)
    return [torch.randn(tokens, experts, dtype=torch.float64) + bias for _ in range(layers)]


def padding(side, length=LENGTH):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, slice(0, 7) if side == "left" else slice(-7, None)] = 0
    return mask


def with_gradient(function, logits):
    leaves = [tensor.clone().requires_grad_() for tensor in logits]
    loss = function(leaves)
    return loss.detach(), torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_is_that_of_transformers(side, top_k):
    logits, mask = router_logits(2 * LENGTH), None if side is None else padding(side)
    expected = with_gradient(lambda own: load_balancing_loss_func(tuple(own), 5, top_k, mask), logits)
    flat = None if mask is None else mask.flatten()
    actual = with_gradient(lambda own: router_loss(own, top_k, mask=flat), logits)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=1e-9, check_dtype=False)
    assert actual[0].dtype == torch.float32


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_the_parts_of_the_ranks_add_up_to_the_whole(side, size):
    """Also where a rank has padding only."""
    logits = [tensor.view(2, LENGTH, 5) for tensor in router_logits(2 * LENGTH)]
    mask = None if side is None else padding(side)
    if mask is not None:
        mask[0] = mask[1]
        mask[:, slice(0, 16) if side == "left" else slice(-16, None)] = 0

    def part(group=None):
        mine = [tensor if group is None else tensor.chunk(size, 1)[group.rank] for tensor in logits]
        flat = mask if group is None or mask is None else mask.chunk(size, 1)[group.rank]
        return with_gradient(
            lambda own: router_loss(
                [tensor.flatten(0, 1) for tensor in own],
                2,
                mask=None if flat is None else flat.flatten(),
                sum_over_ranks=None if group is None else group.all_reduce,
            ),
            mine,
        )

    loss, grads = part()
    parts = run_simulated(part, size)
    assert sum(value for value, _ in parts).item() == pytest.approx(loss.item(), rel=TOLERANCE)
    for layer, grad in enumerate(grads):
        sharded = torch.cat([grads[layer] for _, grads in parts], dim=1)
        torch.testing.assert_close(sharded, grad, rtol=TOLERANCE, atol=1e-9)


def test_padding_alone_has_none():
    loss, grads = with_gradient(lambda own: router_loss(own, 2, mask=torch.zeros(6)), router_logits(6))
    assert loss == 0
    assert not any(grad.any() for grad in grads)


def test_16_bit_logits_are_summed_in_fp32():
    """2000 probabilities of about 1/5 in bf16: their sum in 16 bits stops growing at 64."""
    logits = [tensor.bfloat16() for tensor in router_logits(2000)]
    exact = router_loss([tensor.double() for tensor in logits], 2)
    assert router_loss(logits, 2).item() == pytest.approx(exact.item(), rel=2e-3)


def mixture(name, **settings):
    """A model whose router loss is on, and weighs enough to show."""
    config_class, model_class, own = ARCHITECTURES[name]
    return build(
        config_class, model_class, **{**own, "output_router_logits": True, "router_aux_loss_coef": 0.5, **settings}
    )


def make_batch(side=None):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (2, LENGTH), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    batch["labels"][0, 5:9] = -100
    if side is not None:
        mask = padding(side)
        batch |= {"attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}
        if side == "left":
            batch["labels"][1, 7] = -100  # nothing to predict it from
    return batch


ON_EITHER_SIDE = [*((name, None) for name in MIXTURES), ("mixtral", "left"), ("mixtral", "right")]


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize(("name", "side"), ON_EITHER_SIDE)
def test_loss_and_gradients_are_the_plain_models(name, side, recompute):
    model, batch = mixture(name), make_batch(side)
    plain = loss_and_gradients(model, **batch)
    without = model(**batch, output_router_logits=False).loss
    assert plain["loss"] - without > 0.3
    apply_settings(model, tiny_settings(recompute=recompute))
    assert_close(loss_and_gradients(model, **batch), plain)
    assert model(**batch, output_router_logits=False).loss.item() == pytest.approx(without.item(), rel=TOLERANCE)


@pytest.mark.parametrize(("name", "side"), ON_EITHER_SIDE)
def test_on_two_shards_it_is_that_of_the_whole_sequence(name, side):
    model, batch = mixture(name), make_batch(side)
    plain = loss_and_gradients(model, **batch)
    assert_close(sharded_loss_and_gradients(model, batch, recompute=True), plain)


def test_a_rank_without_valid_labels_still_counts_its_tokens():
    model, batch = mixture("mixtral"), make_batch()
    batch["labels"][:, LENGTH // 2 :] = -100
    plain = loss_and_gradients(model, **batch)
    assert_close(sharded_loss_and_gradients(model, batch), plain)


@pytest.mark.parametrize("sp_size", [1, 2])
def test_micro_batches_of_a_step_weigh_by_their_share_of_its_labels(sp_size):
    """transformers adds the whole router loss for each micro-batch: accumulation over n would train it n times."""
    model, batch = mixture("mixtral"), make_batch()
    batch["labels"][1, 8:] = -100
    rows = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(2)]
    counts = [int((shift(row["labels"]) != -100).sum()) for row in rows]
    total = sum(counts)
    assert counts[0] > 3 * counts[1] > 0
    model.zero_grad()
    expected = 0
    for row, count in zip(rows, counts, strict=True):
        output = model(**row)  # cross-entropy as a mean, and 0.5 of the router loss
        loss = output.loss * count / total
        loss.backward()
        expected += loss.detach()
    plain = {"loss": expected, **{name: parameter.grad.clone() for name, parameter in model.named_parameters()}}
    if sp_size == 1:
        apply_settings(model, tiny_settings())
        parts = []
        for row in rows:
            part = loss_and_gradients(model, **row, num_items_in_batch=total)
            parts.append({name: value.clone() for name, value in part.items()})
    else:
        parts = [sharded_loss_and_gradients(model, row, num_items_in_batch=total) for row in rows]
    assert_close({name: parts[0][name] + parts[1][name] for name in plain}, plain)


@pytest.mark.parametrize("sp_size", [1, 2])
def test_a_micro_batch_without_valid_labels_adds_nothing(sp_size):
    model, batch = mixture("mixtral"), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    if sp_size == 1:
        apply_settings(model, tiny_settings(recompute=True))
        results = loss_and_gradients(model, **batch, num_items_in_batch=100)
    else:
        results = sharded_loss_and_gradients(model, batch, num_items_in_batch=100)
    assert not any(value.any() for value in results.values())


def test_a_step_without_valid_labels_is_no_division_by_zero():
    model, batch = apply_settings(mixture("mixtral"), tiny_settings()), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for num_items in (0, torch.tensor(0)):
        results = loss_and_gradients(model, **batch, num_items_in_batch=num_items)
        assert not any(value.any() for value in results.values())


def test_what_was_asked_for_is_in_the_output():
    model, batch = mixture("qwen3-moe"), make_batch()
    expected = model(**batch)
    output = apply_settings(model, tiny_settings())(**batch)
    assert output.aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=TOLERANCE)
    assert len(output.router_logits) == 2
    for actual, plain in zip(output.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(actual, plain, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("asked", ["config", "argument"])
def test_it_is_on_by_the_config_or_by_the_argument(asked):
    model, batch = mixture("olmoe", output_router_logits=asked == "config"), make_batch()
    arguments = {} if asked == "config" else {"output_router_logits": True}
    plain = model(**batch, **arguments).loss.item()
    patched = apply_settings(model, tiny_settings())
    assert patched(**batch, **arguments).loss.item() == pytest.approx(plain, rel=TOLERANCE)
    if asked == "argument":
        assert patched(**batch).loss.item() < plain - 0.3


def test_a_model_without_one_refuses_to_compute_it():
    model = apply_settings(tiny_model("llama"), tiny_settings())
    with pytest.raises(ValueError, match="LlamaForCausalLM has no router loss that mst_ds knows"):
        model(**make_batch(), output_router_logits=True)
