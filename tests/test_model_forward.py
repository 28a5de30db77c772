"""What a patched model makes of its arguments: labels, packed documents, padding, caches, positions."""

import functools
import inspect

import pytest
import torch
from plain_model import TOLERANCE, assert_close, loss_and_gradients, make_batch, shift
from sharded import sharded_loss_and_gradients
from tiny import tiny_llama, tiny_settings
from tiny_models import ARCHITECTURES, GQA, OWN_ATTENTION, SHARDABLE, build, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from mst_ds import apply_settings, remove_plan
from mst_ds.patching.logits import LogitsLeftOutByThePlan

LENGTH = 30
# Documents of each row. The second shard of two begins inside the second and the third; some are longer than a
# longrope's original length, 10, beyond which a document has other frequencies.
DOCUMENTS = [[12, 8, 10], [3, 17, 2, 8]]
# The tokens of the second row that are padding.
PADDING = {"left": [(0, 6)], "right": [(21, 30)], "middle": [(9, 16)], "everywhere": [(0, 2), (12, 18), (29, 30)]}


def packed():
    batch = make_batch(LENGTH)
    batch["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
    return batch


def padded(where):
    batch = make_batch(LENGTH)
    batch["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long)
    for start, stop in PADDING[where]:
        batch["attention_mask"][1, start:stop] = 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def runs_of(batch):
    """Of each document of each row, or stretch between padding: its row, start and stop."""
    mask = batch.get("attention_mask", torch.ones(2, LENGTH))
    positions = batch.get("position_ids", torch.arange(LENGTH).expand(2, -1))
    for row in range(2):
        starts = [
            token
            for token in range(LENGTH)
            if token == 0 or positions[row, token] == 0 or mask[row, token] != mask[row, token - 1]
        ]
        for start, stop in zip(starts, [*starts[1:], LENGTH], strict=True):
            if mask[row, start]:
                yield row, start, stop


def each_alone(name, batch):
    """Loss and gradients of the plain model on each document by itself, one token one weight."""
    model = tiny_model(name)
    positions = batch.get("position_ids", torch.arange(LENGTH).expand(2, -1))
    targets = shift(batch["labels"], batch.get("position_ids"), batch.get("attention_mask"))
    total = int((targets != -100).sum())
    model.zero_grad()
    loss = 0
    for row, start, stop in runs_of(batch):
        own = {key: tensor[row : row + 1, start:stop] for key, tensor in batch.items() if key == "input_ids"}
        labels = targets[row : row + 1, start:stop]
        part = model(
            **own,
            shift_labels=labels,
            labels=labels,
            position_ids=positions[row : row + 1, start:stop],
            num_items_in_batch=total,
            use_cache=False,
        ).loss
        part.backward()
        loss += part.detach()
    return {"loss": loss, **{key: parameter.grad.clone() for key, parameter in model.named_parameters()}}


@functools.cache
def packed_alone(name):
    return each_alone(name, packed())


@functools.cache
def padded_alone(name, where):
    return each_alone(name, padded(where))


@pytest.mark.parametrize("sp_size", [1, 2])
@pytest.mark.parametrize("name", SHARDABLE)
def test_packed_documents_train_as_each_alone(name, sp_size):
    batch = packed()
    if sp_size == 1:
        model = apply_settings(tiny_model(name), tiny_settings(recompute=True))
        targets = shift(batch.pop("labels"), batch["position_ids"])
        results = loss_and_gradients(model, **batch, shift_labels=targets)
    else:
        results = sharded_loss_and_gradients(tiny_model(name), batch, sp_size)
    assert_close(results, packed_alone(name))


@pytest.mark.parametrize("sp_size", [1, 2])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        *(("llama", where) for where in PADDING),
        *((name, "everywhere") for name in ("mistral", "gemma2", "gpt2", "gpt-oss", "deepseek-v3")),
    ],
)
def test_padding_trains_as_the_unpadded_sequences_alone(name, where, sp_size):
    """The first token after padding has nothing that it is predicted from; what padding parts is parted."""
    batch = padded(where)
    if sp_size == 1:
        results = loss_and_gradients(apply_settings(tiny_model(name), tiny_settings(recompute=True)), **batch)
    else:
        results = sharded_loss_and_gradients(tiny_model(name), batch, sp_size)
    assert_close(results, padded_alone(name, where))


@pytest.mark.parametrize("where", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-neox", *OWN_ATTENTION])
def test_padding_on_one_side_is_that_of_transformers(name, where):
    batch = padded(where)
    if where == "left":
        batch["labels"][1, 6] = -100  # transformers would predict it from padding
    plain = loss_and_gradients(tiny_model(name), **batch)
    assert_close(loss_and_gradients(apply_settings(tiny_model(name), tiny_settings()), **batch), plain)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_packed_documents_with_labels_are_those_of_transformers(name):
    """Labels that are not shifted yet: the first token of a document is a target of the one before, as there."""
    batch = packed()
    # transformers keeps packed documents apart only where it makes no cache.
    plain = loss_and_gradients(tiny_model(name), **batch, use_cache=False)
    assert_close(loss_and_gradients(apply_settings(tiny_model(name), tiny_settings()), **batch), plain)


def test_packed_and_padded_at_once():
    batch = packed()
    batch["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long)
    batch["attention_mask"][0, 20:] = batch["attention_mask"][1, 5:9] = 0
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = each_alone("llama", batch)
    assert_close(sharded_loss_and_gradients(tiny_model("llama"), batch), expected)


def test_a_mask_on_one_rank_only_is_no_hang():
    batch = make_batch(LENGTH)
    expected = loss_and_gradients(tiny_model("llama"), **batch)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    assert_close(sharded_loss_and_gradients(tiny_model("llama"), {**batch, "attention_mask": mask}), expected)


@pytest.mark.parametrize("given", ["labels", "shift_labels"])
def test_labels_on_padding_are_refused(given):
    model, batch = apply_settings(tiny_model("llama"), tiny_settings()), padded("right")
    labels = batch.pop("labels")
    labels[1, 25] = 5
    with pytest.raises(ValueError, match=f"^{given} must be -100 where attention_mask is 0"):
        model(**batch, **{given: labels})


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(2, 1, LENGTH, LENGTH),
        torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool),
        {"full_attention": None},
        torch.ones(LENGTH),
    ],
    ids=["4-D", "4-D-bool", "dict", "1-D"],
)
def test_other_masks_are_refused(mask):
    model, batch = apply_settings(tiny_model("llama"), tiny_settings()), make_batch(LENGTH)
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, length\)"):
        model(**batch, attention_mask=mask)


@pytest.mark.parametrize("mask", [torch.full((2, LENGTH), 2), torch.ones(2, LENGTH - 1)], ids=["values", "length"])
def test_masks_of_other_values_or_lengths_are_refused(mask):
    model, batch = apply_settings(tiny_model("llama"), tiny_settings()), make_batch(LENGTH)
    with pytest.raises(ValueError, match=r"attention_mask must be .*, 1 for a token and 0 for padding; got shape"):
        model(input_ids=batch["input_ids"], attention_mask=mask)


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_packed_documents_need_the_attention_interface(name):
    model, batch = apply_settings(tiny_model(name), tiny_settings()), packed()
    with pytest.raises(ValueError, match=r"does not use transformers' attention interface, .* \(--packing none\)"):
        model(**batch)
    batch["position_ids"] = torch.arange(LENGTH).expand(2, -1)
    plain = loss_and_gradients(tiny_model(name), **batch)
    assert_close(loss_and_gradients(model, **batch), plain)


ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 20,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 20},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 20,
    },
}


@pytest.mark.parametrize("rope_type", ROPES)
def test_rotary_embeddings_that_depend_on_the_length_see_the_whole_sequence(rope_type):
    """The first shard's positions are below the original length, 20, the second's go beyond."""
    settings = {**GQA, "rope_parameters": ROPES[rope_type], "max_position_embeddings": 20}
    batch = make_batch(LENGTH)
    short = {key: tensor[:, :16] for key, tensor in batch.items()} | {"labels": batch["input_ids"][:, :16]}
    for own in (short, batch):
        plain = loss_and_gradients(build(LlamaConfig, LlamaForCausalLM, **settings), **own)
        assert_close(sharded_loss_and_gradients(build(LlamaConfig, LlamaForCausalLM, **settings), own), plain)
        patched = apply_settings(build(LlamaConfig, LlamaForCausalLM, **settings), tiny_settings())
        assert_close(loss_and_gradients(patched, **own), plain)


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        *((name, {}) for name in ("llama", "mistral", "gemma2", "gpt-oss", "gpt2", "deepseek-v3")),
        *((name, {"use_cache": False}) for name in ("llama", "gpt-oss")),
        *((name, {"cache_implementation": "static"}) for name in ("llama", "mistral")),
    ],
    ids=str,
)
def test_generates_with_the_plan_and_after_it(name, cache):
    model, ids = tiny_model(name).eval(), make_batch()["input_ids"][:, :12]
    mask = torch.ones_like(ids)
    if name != "gemma2":  # with padding its own eager attention gives NaN in fp64
        mask[1, :5] = 0  # as a batch of prompts is padded
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": mask, **cache}
    if "cache_implementation" in cache:
        settings["disable_compile"] = True
    expected = model.generate(ids, **settings)
    apply_settings(model, tiny_settings(recompute=True))
    assert torch.equal(model.generate(ids, **settings), expected)
    # Between two generations it trains with its own attention.
    assert_close(loss_and_gradients(model, **make_batch()), loss_and_gradients(tiny_model(name).eval(), **make_batch()))
    remove_plan(model)
    assert torch.equal(model.generate(ids, **settings), expected)


def test_a_prefix_is_not_trained():
    model, batch = apply_settings(tiny_model("llama"), tiny_settings()), make_batch()
    cache = tiny_model("llama")(batch["input_ids"], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values, such as a learned prefix, cannot be trained with a plan"):
        model(**batch, past_key_values=cache)


def on_a_shard():
    # Nothing communicates before the arguments are checked, so any object will do for the group.
    return apply_settings(tiny_model("llama"), tiny_settings(2), sequence_group=object())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.ones(1, 8).long()}, "with sp_size > 1 pass shift_labels in place of labels"),
        ({"shift_labels": torch.ones(1, 8).long()}, "with sp_size > 1 pass num_items_in_batch"),
        ({"use_cache": True}, "a model with sp_size > 1 cannot generate"),
    ],
    ids=["labels", "no-count", "generate"],
)
def test_what_a_shard_cannot_know_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        on_a_shard()(input_ids=torch.ones(1, 8).long(), **arguments)


@pytest.mark.parametrize("num_items", [100, torch.tensor(100)], ids=["int", "tensor"])
def test_num_items_in_batch_and_labels_that_are_already_shifted(num_items):
    batch = make_batch()
    plain = loss_and_gradients(tiny_model("llama"), **batch, num_items_in_batch=num_items)
    model = apply_settings(tiny_model("llama"), tiny_settings())
    assert_close(loss_and_gradients(model, **batch, num_items_in_batch=num_items), plain)
    only_shifted = {"input_ids": batch["input_ids"], "shift_labels": shift(batch["labels"])}
    assert_close(loss_and_gradients(model, **only_shifted, num_items_in_batch=num_items), plain)


def test_embeddings_as_input():
    plain, patched, batch = tiny_model("llama"), apply_settings(tiny_model("llama"), tiny_settings()), make_batch()
    embeddings = plain.get_input_embeddings()(batch["input_ids"]).detach()
    losses = [model(inputs_embeds=embeddings, labels=batch["labels"]).loss for model in (patched, plain)]
    assert abs(losses[0] / losses[1] - 1) <= TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_labels_the_logits_are_there(name):
    model, ids = tiny_model(name), make_batch()["input_ids"]
    expected = model(input_ids=ids).logits
    apply_settings(model, tiny_settings())
    output = model(input_ids=ids)
    torch.testing.assert_close(output.logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert output.loss is None


def test_logits_of_packed_and_padded_rows():
    plain, model = tiny_model("llama"), apply_settings(tiny_model("llama"), tiny_settings())
    for batch in (packed(), padded("everywhere")):
        own = {key: tensor for key, tensor in batch.items() if key != "labels"}
        logits = model(**own).logits
        for row, start, stop in runs_of(batch):
            alone = plain(input_ids=batch["input_ids"][row : row + 1, start:stop]).logits
            torch.testing.assert_close(logits[row : row + 1, start:stop], alone, rtol=TOLERANCE, atol=TOLERANCE)


def test_with_labels_there_are_no_logits_but_all_else_that_was_asked_for():
    plain, batch = tiny_model("llama"), make_batch()
    patched = apply_settings(tiny_model("llama"), tiny_settings())
    expected = plain(**batch, output_hidden_states=True)
    output = patched(**batch, output_hidden_states=True)
    assert isinstance(output.logits, LogitsLeftOutByThePlan)
    assert output.past_key_values is None
    assert len(output.hidden_states) == len(expected.hidden_states) == 3
    for actual, hidden_states in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(actual, hidden_states, rtol=TOLERANCE, atol=TOLERANCE)


def test_evaluation_without_gradients():
    plain, patched = (
        tiny_model("llama").eval(),
        apply_settings(tiny_model("llama"), tiny_settings(recompute=True)).eval(),
    )
    with torch.no_grad():
        losses = [model(**make_batch()).loss for model in (patched, plain)]
    assert not losses[0].requires_grad
    assert abs(losses[0] / losses[1] - 1) <= TOLERANCE


def test_a_batch_whose_labels_are_all_ignored():
    model, batch = apply_settings(tiny_model("llama"), tiny_settings(recompute=True)), make_batch()
    results = loss_and_gradients(model, input_ids=batch["input_ids"], labels=torch.full_like(batch["labels"], -100))
    assert all(torch.equal(value, torch.zeros_like(value)) for value in results.values())


def test_the_calling_conventions_of_transformers_are_kept():
    model = apply_settings(tiny_llama(), tiny_settings())
    ids = torch.arange(32).view(2, 16)
    mask = torch.ones_like(ids)
    loss = model(ids, mask, labels=ids).loss
    as_tuple = model(ids, labels=ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], loss)
    assert "labels" in inspect.signature(model.forward).parameters


def test_positional_arguments_and_ignore_index_mean_what_they_meant():
    model = tiny_llama()
    ids = torch.arange(32).view(2, 16)
    names = list(inspect.signature(model.forward).parameters)
    positional = [ids, *[None] * (names.index("labels") - 1), ids]
    expected = model(*positional).loss, model(ids, labels=ids, ignore_index=5).loss
    apply_settings(model, tiny_settings())
    torch.testing.assert_close((model(*positional).loss, model(ids, labels=ids, ignore_index=5).loss), expected)
    assert not torch.equal(*expected)
