"""The decoder of a patched model, called by itself: by trainers and heads that compute their own loss."""

import copy
import functools

import pytest
import torch
from adapted import ATTENTION, MLP, adapted
from plain_model import assert_close, gradients_of, make_batch
from tiny import tiny_settings
from tiny_models import tiny_model

from mst_ds import apply_settings, remove_plan
from mst_ds.preflight.float64 import Float64
from mst_ds.sequence_parallel import run_simulated

LENGTH = 30
# The second shard of two begins inside a document of both rows.
DOCUMENTS = [[12, 8, 10], [3, 17, 2, 8]]
# Of attention: plain, windowed, with sinks and experts, with positions that are learned.
MODELS = ["llama", "mistral", "gpt-oss", "gpt2"]
TOLERANCE = 1e-12


def packed():
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
    return {"input_ids": make_batch(LENGTH)["input_ids"], "position_ids": positions}


def padded():
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :6] = mask[1, 20:] = 0
    return {"input_ids": make_batch(LENGTH)["input_ids"], "attention_mask": mask}


def some_loss(hidden_states, start=0):
    """A number that depends on every hidden state in its own way, as a head of the caller's would."""
    weights = torch.arange(LENGTH * hidden_states.shape[-1], dtype=torch.float64).sin().view(LENGTH, -1)
    return (hidden_states * weights[start : start + hidden_states.shape[1]]).sum()


def results(model, loss):
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


@functools.cache
def each_alone(name):
    """The plain decoder on each document by itself."""
    model, batch = tiny_model(name), packed()
    loss = 0
    with Float64():
        for row, lengths in enumerate(DOCUMENTS):
            start = 0
            for length in lengths:
                own = {key: tensor[row : row + 1, start : start + length] for key, tensor in batch.items()}
                loss = loss + some_loss(model.base_model(**own, use_cache=False).last_hidden_state, start)
                start += length
        return results(model, loss)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("name", MODELS)
def test_alone_on_packed_documents(name, recompute):
    model = apply_settings(tiny_model(name), tiny_settings(recompute=recompute))
    with Float64():
        actual = results(model, some_loss(model.base_model(**packed()).last_hidden_state))
    assert_close(actual, each_alone(name), TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_alone_on_shards(name):
    copies = [tiny_model(name) for _ in range(2)]

    def run(group):
        rank, model = group.rank, copies[group.rank]
        apply_settings(model, tiny_settings(2, recompute=True), sequence_group=group)
        shard = {key: tensor.chunk(2, dim=1)[rank] for key, tensor in packed().items()}
        with Float64():
            loss = some_loss(model.base_model(**shard).last_hidden_state, rank * LENGTH // 2)
            loss.backward()
        return loss.detach()

    actual = {"loss": torch.stack(run_simulated(run, 2)).sum()}
    of_ranks = [gradients_of(model) for model in copies]
    for name_of_parameter in of_ranks[0] | of_ranks[1]:
        actual[name_of_parameter] = sum(grads[name_of_parameter] for grads in of_ranks if name_of_parameter in grads)
    assert_close(actual, each_alone(name), TOLERANCE)


@pytest.mark.parametrize("positional", [False, True], ids=["by-name", "by-place"])
def test_alone_with_padding(positional):
    plain, batch = tiny_model("llama"), padded()
    patched = apply_settings(copy.deepcopy(plain), tiny_settings(recompute=True))
    outcomes = []
    for model in (plain, patched):
        with Float64():
            arguments = (batch["input_ids"], batch["attention_mask"]) if positional else ()
            hidden = model.model(*arguments, **({} if positional else batch), use_cache=False).last_hidden_state
            # What padding itself computes is nobody's affair.
            outcomes.append(results(model, some_loss(hidden * batch["attention_mask"][..., None])))
    assert_close(outcomes[1], outcomes[0], TOLERANCE)


def test_alone_below_adapters_with_embeddings_and_all_hidden_states():
    adapter = {"target_modules": [*ATTENTION, *MLP]}
    plain, patched = adapted("llama", adapter), apply_settings(adapted("llama", adapter), tiny_settings(recompute=True))
    outcomes = []
    for model in (plain, patched):
        base = model.get_base_model()
        embeddings = base.get_input_embeddings()(packed()["input_ids"])
        with Float64():
            output = base.model(inputs_embeds=embeddings, output_hidden_states=True)
            assert len(output.hidden_states) == 3
            outcomes.append(results(model, sum(map(some_loss, output.hidden_states))))
    assert_close(outcomes[1], outcomes[0], TOLERANCE)
    remove_plan(patched)


def test_alone_with_a_cache_it_is_transformers_own():
    plain, ids = tiny_model("llama"), make_batch(LENGTH)["input_ids"]
    patched = apply_settings(copy.deepcopy(plain), tiny_settings(recompute=True))
    expected = plain.model(ids, use_cache=False).last_hidden_state
    first = patched.model(ids[:, :20], use_cache=True)
    rest = patched.model(ids[:, 20:], past_key_values=first.past_key_values).last_hidden_state
    torch.testing.assert_close(torch.cat([first.last_hidden_state, rest], dim=1), expected)
    # And then its plan's again.
    assert patched.model(ids).past_key_values is None
