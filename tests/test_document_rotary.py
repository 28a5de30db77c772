"""Rotary embeddings whose frequencies depend on the length: that of each document, wherever it stands."""

import copy
import functools

import pytest
import torch
from plain_model import assert_close, loss_and_gradients
from sharded import sharded_loss_and_gradients
from tiny import tiny_settings
from tiny_models import GQA, build
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from mst_ds import apply_settings, remove_plan
from mst_ds.patching import find_parts

# Shorter than the original length, far longer, and shorter again.
LENGTHS = (26, 201, 62)
ORIGINAL = 64
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
KINDS = {"sliding_attention": DYNAMIC, "full_attention": LONGROPE}
MODELS = {
    "longrope": (LlamaConfig, LlamaForCausalLM, {**GQA, "rope_parameters": LONGROPE}),
    "dynamic": (LlamaConfig, LlamaForCausalLM, {**GQA, "rope_parameters": DYNAMIC}),
    # Of two kinds of layers, each with its own.
    "kinds": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {**GQA, "head_dim": 8, "sliding_window": 8, "layer_types": list(KINDS), "rope_parameters": KINDS},
    ),
}
TEXTS = torch.randint(3, 97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2)).split(LENGTHS)
TARGETS = sum(LENGTHS) - len(LENGTHS)


def model_of(name):
    config, model, settings = MODELS[name]
    return build(config, model, **settings, max_position_embeddings=ORIGINAL)


@functools.cache
def each_alone(name):
    """Loss and gradients of plain models that have seen nothing else, one token one weight."""
    results = []
    for text in TEXTS:
        batch = {"input_ids": text[None], "labels": text[None], "num_items_in_batch": TARGETS}
        results.append(loss_and_gradients(model_of(name), **batch))
    return {key: sum(result[key] for result in results) for key in results[0]}


def rows(*lengths_of_rows, before=0, after=0):
    """A batch of rows of documents, with padding before and after."""
    texts = iter(TEXTS)
    longest = max(sum(row) for row in lengths_of_rows) + before + after
    batch = {
        "input_ids": torch.zeros(len(lengths_of_rows), longest, dtype=torch.long),
        "labels": torch.full((len(lengths_of_rows), longest), -100),
        "attention_mask": torch.zeros(len(lengths_of_rows), longest, dtype=torch.long),
        # As a run counts them: padding from 0 on, too.
        "position_ids": torch.arange(longest).repeat(len(lengths_of_rows), 1),
    }
    for row, lengths in enumerate(lengths_of_rows):
        start = before
        for length in lengths:
            part = slice(start, start + length)
            batch["input_ids"][row, part] = batch["labels"][row, part] = next(texts)
            batch["attention_mask"][row, part] = 1
            start += length
            batch["position_ids"][row, part.start :] -= batch["position_ids"][row, part.start].item()
        batch["position_ids"][row, start:] = torch.arange(longest - start)
    return batch


BATCHES = {
    "packed": rows(LENGTHS, after=1),  # the second document begins on the first shard and ends on the second
    "padded": rows(*[(length,) for length in LENGTHS], after=1),
    "padded-more": rows(*[(length,) for length in LENGTHS], before=50, after=149),
}


@pytest.mark.parametrize(("sp_size", "layer_chunks"), [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_a_document_has_the_frequencies_of_its_own_length(name, batch, sp_size, layer_chunks):
    results = sharded_loss_and_gradients(model_of(name), BATCHES[batch], sp_size, layer_chunks=layer_chunks)
    assert_close(results, each_alone(name))


@pytest.mark.parametrize("name", MODELS)
def test_padding_without_positions_decides_nothing(name):
    """Positions that the model counts itself begin with the first token, not with what stands before it."""
    batch = {key: value for key, value in BATCHES["padded-more"].items() if key != "position_ids"}
    assert_close(loss_and_gradients(apply_settings(model_of(name), tiny_settings()), **batch), each_alone(name))


def test_what_was_seen_before_decides_nothing():
    """transformers' dynamic embedding keeps the frequencies of the longest document that it has seen."""
    model = model_of("dynamic")
    state = copy.deepcopy(model.model.rotary_emb.__dict__)
    apply_settings(model, tiny_settings())
    for length in (300, 201, 100):
        text = torch.arange(length)[None] % 97
        expected = loss_and_gradients(model_of("dynamic"), input_ids=text, labels=text)
        assert_close(loss_and_gradients(model, input_ids=text, labels=text), expected)
    # Nor does the last forward where transformers' own calls it, such as one that generates.
    assert model.model.rotary_emb(torch.ones(1), torch.arange(5)[None])[0].shape == (1, 5, 8)
    remove_plan(model)
    assert model.model.rotary_emb.max_seq_len_cached == state["max_seq_len_cached"] == ORIGINAL
    assert torch.equal(model.model.rotary_emb.inv_freq, state["_buffers"]["inv_freq"])


def falcon(**settings):
    settings |= {"alibi": False, "num_kv_heads": 2, "new_decoder_architecture": True, "rope_parameters": DYNAMIC}
    model = build(FalconConfig, FalconForCausalLM, **settings, max_position_embeddings=ORIGINAL)
    # Not called, but tokens might meet in it: the model keeps its attention.
    model.transformer.h[0].convolution = nn.Conv1d(1, 1, 1, dtype=torch.float64).requires_grad_(False)
    return model


@pytest.mark.parametrize("before", [0, 50])
def test_padding_decides_nothing_in_a_model_that_keeps_its_own_attention(before):
    batch = rows(*[(length,) for length in LENGTHS], before=before, after=30)
    del batch["position_ids"]
    results = []
    for text in TEXTS:
        own = {"input_ids": text[None], "labels": text[None], "num_items_in_batch": TARGETS}
        results.append(loss_and_gradients(falcon(), **own))
    expected = {key: sum(result[key] for result in results) for key in results[0]}
    assert_close(loss_and_gradients(apply_settings(falcon(), tiny_settings()), **batch), expected)


class OwnRotary(nn.Module):
    """Neither named nor called as transformers' are."""

    rope_type = "dynamic"

    def forward(self, x, seq_len):
        return x, x


def without_rotary(model):
    model.model.rotary_emb = nn.Identity()


def inside_a_layer(model):
    model.model.layers[1].self_attn.rotary_emb = copy.deepcopy(model.model.rotary_emb)


def of_another_kind(model):
    model.model.rotary_emb = OwnRotary()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_rotary, "has no rotary embedding of transformers'"),
        (inside_a_layer, "has LlamaRotaryEmbedding inside its layers"),
        (of_another_kind, "calls OwnRotary with other arguments"),
    ],
)
def test_other_rotary_embeddings_that_depend_on_the_length_are_refused(change, reason):
    model = model_of("dynamic")
    change(model)
    with pytest.raises(ValueError, match=f"^LlamaForCausalLM {reason}, while its rope_type is 'dynamic', .*; allowed"):
        find_parts(model, tiny_settings())


def test_other_positions_than_those_of_the_tokens_are_refused():
    model = apply_settings(model_of("dynamic"), tiny_settings())
    model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0],), {"position_ids": kwargs["position_ids"][:, ::2]}), with_kwargs=True
    )
    with pytest.raises(
        ValueError, match=r"^LlamaRotaryEmbedding is called with positions of shape \(1, 101\), not those"
    ):
        loss_and_gradients(model, input_ids=TEXTS[1][None], labels=TEXTS[1][None])
