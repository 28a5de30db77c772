"""Where systems with the same purpose are wrong, crash or hang, row by row; here each is right, or refused.

Every test is the smallest form of its situation. The wide ones are with the parts themselves.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from itertools import islice

import datasets
import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from error_budget import assert_within_budget, value_and_gradients
from peft import LoraConfig, get_peft_model
from plain_model import assert_close, loss_and_gradients, make_batch
from sharded import sharded_loss_and_gradients, shards_of_a_run
from steps import alone, build_engine, patched_step, train, zero_block
from tiny import Outcome, plain_training, samples, tiny_llama, tiny_settings
from tiny_models import tiny_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from mst_ds import apply_settings
from mst_ds.data import IGNORE_INDEX, ON_HOST, EvalLoader, PackedDataset, ShardedLoader, shard, shift_labels
from mst_ds.data.order import permutation
from mst_ds.minisequence import chunked_loss, chunked_mlp
from mst_ds.topology import Topology, choose_sp_size

# The engines are fp32, and sum in another order than one process.
ENGINE_TOLERANCE = 1e-5

sharded_step = functools.partial(sharded_loss_and_gradients, split=shards_of_a_run)


# Rows 1 to 3: the LM head and its loss


@pytest.mark.parametrize("factor", [1 / 2, 1 / 7, 1024.0], ids=["accumulation", "divided-outside", "loss-scale"])
def test_row_01_the_incoming_gradient_scales_every_gradient(factor: float) -> None:
    """A fused head and loss that writes the head's gradient in its forward never scales it by what comes in."""
    model, batch = tiny_model("llama"), make_batch(30)
    plain = loss_and_gradients(copy.deepcopy(model), **batch)
    apply_settings(model, tiny_settings())
    loss = model(**batch).loss * factor
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = {name: tensor * factor for name, tensor in plain.items()}
    assert_close({"loss": loss.detach(), **gradients}, expected)


def test_row_01_two_accumulated_halves_are_the_mean() -> None:
    """Accumulated over two micro-batches the same head has twice its gradient, while the body has it once."""
    model, batch = tiny_model("llama"), make_batch(30)
    plain = loss_and_gradients(copy.deepcopy(model), **batch)
    apply_settings(model, tiny_settings())
    for _ in range(2):
        (model(**batch).loss / 2).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close({"loss": plain["loss"], **gradients}, plain)


@pytest.mark.parametrize("ignored", [slice(0, 0), slice(0, 29), slice(10, 40)], ids=["none", "half", "whole-chunks"])
def test_row_02_the_mean_is_over_tokens_and_not_over_chunks(ignored: slice) -> None:
    """A mean of the means of chunks weighs tokens unequally where chunks are uneven or have ignored labels."""
    model, batch = tiny_model("llama"), make_batch(29)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"].view(-1)[ignored] = IGNORE_INDEX
    assert_close(patched_step(model, batch, loss_chunks=5), loss_and_gradients(model, **batch))


@pytest.mark.parametrize("enabled", [True, False], ids=["forward-only", "no-grad"])
def test_row_03_a_forward_leaves_no_gradients_behind(enabled: bool) -> None:
    """An operator that computes gradients in its forward leaves them in .grad, even of a leaf under no_grad."""
    model = apply_settings(tiny_model("llama"), tiny_settings())
    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((20, 8), (11, 8)))
    with torch.set_grad_enabled(enabled):
        losses = [model(**make_batch(30)).loss, chunked_loss(x, weight, torch.arange(20) % 11, chunks=3)]
    assert [loss.requires_grad for loss in losses] == [enabled] * 2
    assert all(tensor.grad is None for tensor in (x, weight, *model.parameters()))


# Rows 4 to 6: under DeepSpeed


def engine_steps(rank: int, stages: list[int], seq_len: int, chunks: list[int], reduce_scatter: bool) -> list[Outcome]:
    topology, outcomes = Topology(rank, 2, 2), []
    for stage in stages:
        settings = tiny_settings(topology.sp_size, mlp_chunks=chunks[rank], loss_chunks=chunks[rank])
        model = apply_settings(tiny_llama(), settings, zero_stage=stage)
        engine = build_engine(model, zero_optimization=zero_block(stage, reduce_scatter=reduce_scatter))
        outcomes.append(train(engine, [shard(samples(1, seq_len), topology)], steps=2))
        engine.destroy()
    return outcomes


def assert_as_one_process(stages: list[int], seq_len: int, chunks: list[int], reduce_scatter: bool = True) -> None:
    expected = plain_training(tiny_llama(), samples(1, seq_len), steps=2)
    outcomes, _ = run_ranks(engine_steps, 2, stages, seq_len, chunks, reduce_scatter)
    for stage, outcome in zip(stages, outcomes, strict=True):
        error, name = outcome.worst_gradient_error(expected)
        assert error <= ENGINE_TOLERANCE, f"ZeRO-{stage}: gradient of {name} is off by {error:.1e}"
        assert outcome.worst_loss_error(expected) <= ENGINE_TOLERANCE, f"ZeRO-{stage}"


def test_row_04_fewer_chunks_than_asked_for_train_all_the_same() -> None:
    """Nine tokens in four chunks make three with torch.chunk: a local gradient is applied, or weights never move."""
    assert_as_one_process([1, 2, 3], seq_len=18, chunks=[4, 4])


def test_row_05_ranks_with_different_chunk_counts_train_under_zero3() -> None:
    """Collectives inside of the chunk loop do not match where ranks have different counts: an abort, or a hang."""
    assert_as_one_process([3], seq_len=131, chunks=[2, 8])


@pytest.mark.parametrize(("stages", "reduce_scatter"), [([0, 1, 2], True), ([3], False)])
def test_row_06_no_gradient_is_multiplied_by_the_size_of_the_sequence_group(
    stages: list[int], reduce_scatter: bool
) -> None:
    """At ZeRO 0, 1 and 2, or 3 without reduce-scatter, sequence parallelism makes gradients sp times too large."""
    assert_as_one_process(stages, seq_len=31, chunks=[2, 2], reduce_scatter=reduce_scatter)


# Rows 7 and 8: attention on shards


def test_row_07_packed_documents_do_not_see_each_other_on_shards() -> None:
    """Packed documents under sdpa with sequence parallelism attend to the documents before them."""
    model, ids, lengths = tiny_model("llama"), make_batch(30)["input_ids"][:1], [11, 8, 11]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    batch = {
        "input_ids": ids,
        "labels": ids.masked_fill(position_ids == 0, IGNORE_INDEX),
        "position_ids": position_ids,
    }
    packed = sharded_step(model, batch)
    assert_close(packed, alone(model, ids.split(lengths, dim=1)))


def test_row_08_a_sliding_window_on_shards() -> None:
    """A sliding window under sequence parallelism is applied to nothing, or to the wrong keys."""
    model, batch = tiny_model("mistral"), make_batch(30)
    assert model.config.sliding_window < 15, "a window as long as a shard shows nothing"
    assert_close(sharded_step(model, batch), loss_and_gradients(model, **batch))


def test_row_08_left_padding_on_shards() -> None:
    """Left padding under sequence parallelism is attended to."""
    model, padding = tiny_model("llama"), 17  # all of the first shard and some of the second
    ids = make_batch(30)["input_ids"]
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][1, :padding] = 0
    batch["labels"][1, : padding + 1] = IGNORE_INDEX
    padded = sharded_step(model, batch)
    assert_close(padded, alone(model, [ids[:1], ids[1:, padding:]]))


# Rows 9 to 11: which parameters, and what a recompute repeats


def test_row_09_tied_embeddings() -> None:
    """A tied head's gradient is lost, or added where its other half is not."""
    model, batch = tiny_model("llama-bias-tied"), make_batch(30)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for step in (sharded_step, patched_step):
        assert_close(step(model, batch), loss_and_gradients(model, **batch))


def assert_adapters_train(target_modules: list[str], num_trained: int) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=target_modules, init_lora_weights=False)
    model, batch = get_peft_model(tiny_model("llama"), config), make_batch(30)
    plain = loss_and_gradients(model, **batch)
    assert len(plain) == 1 + num_trained
    assert_close(patched_step(model, batch), plain)


def test_row_09_parameters_that_nobody_lists_are_trained() -> None:
    """LoRA parameters that a user does not name among a tiled module's parameters have wrong gradients, or none."""
    assert_adapters_train(["q_proj", "gate_proj", "up_proj", "down_proj", "lm_head"], num_trained=2 * (2 * 4 + 1))


def test_row_10_adapters_in_mlps_alone() -> None:
    """A tiled MLP whose input needs no gradient gives its parameters none."""
    assert_adapters_train(["gate_proj", "up_proj", "down_proj"], num_trained=2 * 2 * 3)


@pytest.mark.parametrize("trained", ["lm_head", "mlp"])
def test_row_10_a_part_trained_on_a_frozen_body(trained: str) -> None:
    """A fused loss whose input needs no gradient has no grad_fn, so that a head on a frozen body is not trained."""
    model, batch = tiny_model("llama"), make_batch(30)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    plain = loss_and_gradients(model, **batch)
    assert len(plain) == 1 + (1 if trained == "lm_head" else 6)
    assert_close(patched_step(model, batch), plain)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_row_11_dropout_inside_of_an_mlp_drops_the_same_in_the_backward(recompute: bool) -> None:
    """A tiled MLP draws another dropout mask when it recomputes: its gradient is that of another function."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(**sizes, resid_pdrop=0.3, attn_pdrop=0.0, embd_pdrop=0.0, bos_token_id=1, eos_token_id=2)
    model = apply_settings(GPT2LMHeadModel(config).double().train(), tiny_settings(recompute=recompute))
    batch = make_batch(30)

    def loss_after(step: float) -> Tensor:
        with torch.no_grad():
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter.add_(direction, alpha=step)
        torch.manual_seed(5)
        return model(**batch).loss

    directions = [torch.randn_like(parameter) for parameter in model.parameters()]
    loss_after(0.0).backward()
    slope = sum((parameter.grad * d).sum() for parameter, d in zip(model.parameters(), directions, strict=True))
    with torch.no_grad():
        measured = (loss_after(1e-6) - loss_after(-2e-6)) / 2e-6
    # The error of a central difference: its step squared, times the third derivative.
    torch.testing.assert_close(slope, measured, rtol=1e-6, atol=0.0)


def test_row_11_autocast() -> None:
    """Under autocast a tiled MLP mixes dtypes and fails."""
    plain, patched = (tiny_model("llama").float() for _ in range(2))
    apply_settings(patched, tiny_settings())
    results = []
    for model in (plain, patched):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**make_batch(30)).loss
        loss.backward()
        results.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    assert {tensor.dtype for tensor in results[1].values()} == {torch.float32}
    # Both are about 2e-2 off the truth.
    assert_close(results[1], results[0], tolerance=5e-2)


# Rows 12 and 13: sums over chunks, and over nothing

CHUNKS, TOKENS = 512, 4 * 512 + 3
LABELS = torch.arange(TOKENS) % 99


def plain_mlp(t: dict[str, Tensor]) -> Tensor:
    return F.linear(F.silu(F.linear(t["x"], t["gate"])) * F.linear(t["x"], t["up"]), t["down"])


def our_mlp(t: dict[str, Tensor]) -> Tensor:
    return chunked_mlp(t["x"], t["gate"], t["up"], t["down"], chunks=CHUNKS)


def plain_loss(t: dict[str, Tensor]) -> Tensor:
    logits = F.linear(t["x"], t["head"])
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), LABELS)


def our_loss(t: dict[str, Tensor]) -> Tensor:
    return chunked_loss(t["x"], t["head"], LABELS, chunks=CHUNKS)


@pytest.mark.parametrize(
    ("plain", "ours", "shapes"),
    [
        (plain_mlp, our_mlp, {"x": (TOKENS, 32), "gate": (64, 32), "up": (64, 32), "down": (32, 64)}),
        (plain_loss, our_loss, {"x": (TOKENS, 32), "head": (99, 32)}),
    ],
    ids=["mlp", "head"],
)
def test_row_12_sums_over_512_chunks_are_as_exact_as_one(
    plain: Callable[..., Tensor], ours: Callable[..., Tensor], shapes: dict[str, tuple[int, int]]
) -> None:
    """Weight gradients summed over chunks in bf16 lose a digit at 512 chunks."""
    torch.manual_seed(0)
    tensors = {name: (torch.randn(shape) / shape[1] ** 0.5).bfloat16() for name, shape in shapes.items()}
    grad_output = torch.randn_like(plain(tensors))
    truth = value_and_gradients(plain, tensors, torch.float64, grad_output)
    reference, candidate = (value_and_gradients(f, tensors, torch.bfloat16, grad_output) for f in (plain, ours))
    assert_within_budget(candidate, reference, truth)


def test_row_13_a_rank_without_labels_adds_nothing() -> None:
    """A rank whose labels are all ignored has a loss of NaN, a mean over nothing."""
    model, batch = tiny_model("llama"), make_batch(30)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, 15:] = IGNORE_INDEX
    assert bool((shard(batch, Topology(1, 2, 2))["shift_labels"] == IGNORE_INDEX).all())
    assert_close(sharded_step(model, batch), loss_and_gradients(model, **batch))


def test_row_13_no_labels_at_all() -> None:
    """The same in one process: the loss is 0 and so is every gradient."""
    model, batch = apply_settings(tiny_model("llama"), tiny_settings()), make_batch(30)
    batch["labels"].fill_(IGNORE_INDEX)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in loss_and_gradients(model, **batch).values())


# Rows 14 and 15: the data


def documents(*lengths: int) -> datasets.Dataset:
    """Tokens that count up from 0 over all documents."""
    numbers = iter(range(sum(lengths)))
    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})
    rows = [list(islice(numbers, length)) for length in lengths]
    return datasets.Dataset.from_dict({"input_ids": rows}, features=features)


def loaders(dataset: PackedDataset, dp_size: int, sp_size: int, micro: int = 1) -> list[ShardedLoader]:
    topologies = [Topology(rank, dp_size * sp_size, sp_size) for rank in range(dp_size * sp_size)]
    return [ShardedLoader(dataset, topology, micro_batch_size=micro, seed=7) for topology in topologies]


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_row_14_ranks_never_have_more_or_other_batches_than_others(packing: str) -> None:
    """Loaders of unequal length hang; a smaller last batch, or rows of unequal lengths, break the exchange."""
    dataset = PackedDataset(documents(9, 4, 13, 7), seq_len=5, pad_id=0, packing=packing)
    num_samples = {"documents": 7, "none": 2 + 1 + 3 + 2}[packing]
    assert len(dataset) == num_samples
    of_ranks = loaders(dataset, dp_size=2, sp_size=2, micro=3)
    for _ in range(6):  # through the end of an epoch that the batches do not divide
        batches = [next(loader) for loader in of_ranks]
        assert {batch[name].shape for batch in batches for name in batch.keys() - ON_HOST} == {(3, 3)}
    evaluations = [list(EvalLoader(dataset, loader.topology, micro_batch_size=3)) for loader in of_ranks]
    assert [len(batches) for batches in evaluations] == [2] * 4
    shapes = {batch[name].shape for batches in evaluations for batch in batches for name in batch.keys() - ON_HOST}
    assert shapes == {(3, 3)}
    # Every token once, and those that fill up the last batch count for nothing.
    seen = torch.cat([batch["shift_labels"].flatten() for batches in evaluations for batch in batches])
    expected = torch.cat([shift_labels(dataset[index]["labels"]) for index in range(num_samples)])
    assert sorted(seen[seen != IGNORE_INDEX].tolist()) == sorted(expected[expected != IGNORE_INDEX].tolist())


def sample_numbers(of_ranks: list[ShardedLoader], steps: int) -> list[int]:
    """Which samples the ranks of one sequence group get in the next steps: the first token of a sample tells."""
    numbers = []
    for _ in range(steps):
        first, *_ = [next(loader) for loader in of_ranks]
        numbers.append(int(first["input_ids"][0, 0]) // of_ranks[0].dataset.seq_len)
    return numbers


def test_row_15_leaving_an_epoch_early_leaves_nothing_behind() -> None:
    """Shards that were prepared and not taken when an epoch was left come first in the next one."""
    dataset = PackedDataset(documents(40), seq_len=5, pad_id=0)
    whole = sample_numbers(loaders(dataset, 1, 2), 16)
    of_ranks = loaders(dataset, 1, 2)
    left_early = sample_numbers(of_ranks, 3)
    state = of_ranks[0].state_dict()
    resumed = loaders(dataset, 1, 2)
    for loader in resumed:
        loader.load_state_dict(state)
    for going_on in (of_ranks, resumed):
        assert left_early + sample_numbers(going_on, 13) == whole


def test_row_15_an_epochs_order_is_its_own_from_the_first_sample_on() -> None:
    """With workers that have read ahead, set_epoch shuffles one epoch late."""
    dataset = PackedDataset(documents(40), seq_len=5, pad_id=0)
    numbers = sample_numbers(loaders(dataset, 1, 2), 24)
    epochs = [numbers[start : start + 8] for start in (0, 8, 16)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    assert epochs == [permutation(8, 7, epoch).tolist() for epoch in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3


# Rows 16 and 17: sizes


def test_row_16_a_number_of_heads_that_sp_does_not_divide() -> None:
    """Where sp does not divide the number of query heads the model is refused."""
    model, batch = tiny_llama().double(), make_batch(32)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (6, 2)
    assert_close(sharded_step(model, batch, sp_size=4), loss_and_gradients(model, **batch))
    with pytest.raises(ValueError, match=r"sp_size is 8, but the model has 6 query heads.*allowed: 1, 2, 4"):
        choose_sp_size(8, world_size=8, num_attention_heads=6)


def test_row_17_a_length_that_sp_does_not_divide() -> None:
    """Where sp does not divide the sequence the batch is refused."""
    model, batch = tiny_model("llama"), make_batch(29)
    assert_close(sharded_step(model, batch), loss_and_gradients(model, **batch))
