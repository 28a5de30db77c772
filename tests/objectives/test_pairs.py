"""Preferences between documents as what a step minimises: packed or a row each, on one rank and sharded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from distributed import run_ranks
from plain_model import assert_close, gradients_of
from steps import build_engine, zero_block
from tiny import tiny_settings
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from mst_ds import apply_settings
from mst_ds.data import Batch, shard
from mst_ds.objectives import Documents, Objective, PairedPreferences, SampledPolicy
from mst_ds.preflight.float64 import Float64
from mst_ds.sequence_parallel import SequenceGroup, new_sequence_group, run_simulated
from mst_ds.topology import Topology

EXACT = 1e-11
# Two pairs, whose prompts have no labels.
LENGTHS, PROMPTS = (11, 7, 9, 13), (3, 3, 4, 4)
REF = torch.tensor([-31.5, -20.0, -26.0, -40.0], dtype=torch.float64)


def documents() -> list[tuple[Tensor, Tensor]]:
    """The tokens of each and its labels, not shifted."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for length, prompt in zip(LENGTHS, PROMPTS, strict=True):
        ids = torch.randint(3, 97, (length,), generator=generator)
        made.append((ids, ids.clone().index_fill(0, torch.arange(prompt), -100)))
    return made


def packed() -> Batch:
    """A pair a row, with padding behind it."""
    rows: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "position_ids": [], "attention_mask": []}
    for first, second in (documents()[:2], documents()[2:]):
        ids = torch.cat([first[0], second[0]])
        padding = 24 - len(ids)
        positions = [torch.arange(len(each[0])) for each in (first, second)] + [torch.arange(padding)]
        rows["input_ids"].append(torch.cat([ids, ids.new_zeros(padding)]))
        rows["labels"].append(torch.cat([first[1], second[1], ids.new_full((padding,), -100)]))
        rows["position_ids"].append(torch.cat(positions))
        rows["attention_mask"].append(torch.cat([torch.ones_like(ids), ids.new_zeros(padding)]))
    return {name: torch.stack(tensors) for name, tensors in rows.items()}


def one_a_row() -> Batch:
    rows: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, labels in documents():
        padding = 14 - len(ids)
        rows["input_ids"].append(torch.cat([ids, ids.new_zeros(padding)]))
        rows["labels"].append(torch.cat([labels, ids.new_full((padding,), -100)]))
        rows["attention_mask"].append(torch.cat([torch.ones_like(ids), ids.new_zeros(padding)]))
    return {name: torch.stack(tensors) for name, tensors in rows.items()}


BATCHES = {"packed": packed, "one a row": one_a_row}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.3, "label_smoothing": 0.1},
    "ipo": {"loss_type": "ipo", "beta": 0.3},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.4},
}


def plain_step(kind: str) -> dict[str, Tensor]:
    """Each document by itself, from all its logits; the mean over the two pairs."""
    model, logps, lengths = tiny_model("llama"), [], []
    with Float64():
        for ids, labels in documents():
            log_probs = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], dim=-1)
            targets = labels[1:]
            counted = targets != -100
            logps.append(log_probs[counted].gather(-1, targets[counted].unsqueeze(-1)).sum())
            lengths.append(int(counted.sum()))
        losses = []
        for first in (0, 2):
            ratios = [logps[i] - REF[i] for i in (first, first + 1)]
            if kind == "sigmoid":
                logit = 0.3 * (ratios[0] - ratios[1])
                losses.append(-0.9 * logsigmoid(logit) - 0.1 * logsigmoid(-logit))
            elif kind == "ipo":
                means = [ratio / lengths[first + i] for i, ratio in enumerate(ratios)]
                losses.append((means[0] - means[1] - 1 / 0.6) ** 2)
            else:
                means = [logps[i] / lengths[i] for i in (first, first + 1)]
                losses.append(-logsigmoid(2.0 * (means[0] - means[1] - 0.4)))
        loss = sum(losses) / 2
        loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


def sharded_batch(batch: Batch, topology: Topology, layer_chunks: int) -> Batch:
    return {**shard(batch, topology, layer_chunks=layer_chunks), "ref_logps": REF}


def sum_of_ranks(batch: Batch, sp_size: int, layer_chunks: int = 1, **settings: Any) -> dict[str, Tensor]:
    """The sums over the ranks of what the objective gives, divided by the sum of what it counts."""
    models: list[nn.Module] = [tiny_model("llama") for _ in range(sp_size)]
    counts = [0] * sp_size

    def run(group: SequenceGroup | None) -> Tensor:
        rank = 0 if group is None else group.rank
        own = apply_settings(models[rank], tiny_settings(sp_size, layer_chunks=layer_chunks), sequence_group=group)
        objective: Objective = PairedPreferences(**settings, group=group)
        mine = sharded_batch(batch, Topology(rank, sp_size, sp_size), layer_chunks)
        counts[rank] = objective.num_items(mine)
        with Float64():
            loss = objective.measure(own, mine, 2).loss
            loss.backward()
        return loss.detach()

    losses = [run(None)] if sp_size == 1 else run_simulated(run, sp_size)
    assert sum(counts) == 2
    of_ranks = [gradients_of(own) for own in models]
    return {"loss": sum(losses), **{name: sum(each[name] for each in of_ranks) for name in of_ranks[0]}}


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("layout", BATCHES)
def test_loss_and_gradients_are_those_of_each_document_alone(layout: str, kind: str) -> None:
    assert_close(sum_of_ranks(BATCHES[layout](), 1, **OBJECTIVES[kind]), plain_step(kind), EXACT)


@pytest.mark.parametrize(("sp_size", "layer_chunks"), [(2, 1), (2, 3), (3, 1)])
@pytest.mark.parametrize(("layout", "kind"), [("packed", "sigmoid"), ("one a row", "ipo"), ("packed", "simpo")])
def test_shards_give_what_the_whole_sequences_give(layout: str, kind: str, sp_size: int, layer_chunks: int) -> None:
    """A document's log-probability is summed over its ranks, and so is the gradient by it."""
    found = sum_of_ranks(BATCHES[layout](), sp_size, layer_chunks, **OBJECTIVES[kind])
    assert_close(found, plain_step(kind), EXACT)


ADVANTAGES = torch.tensor([1.0, -0.5, 2.0, -1.5], dtype=torch.float64)


def old_logps(lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    """Of each document, at each of its tokens; the second one's are those of the model itself."""
    generator = torch.Generator().manual_seed(2)
    made = [-4.5 - 0.2 * torch.rand(length, generator=generator, dtype=torch.float64) for length in lengths]
    made[1] = torch.full_like(made[1], torch.nan)
    return made


@pytest.mark.parametrize("sp_size", [1, 2])
@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo"])
def test_sampled_answers_are_those_of_each_document_alone(kind: Any, sp_size: int) -> None:
    """By the formula, of all logits: ratios on both sides of the clip, and one document of this policy."""
    losses, lengths, plain = [], [], tiny_model("llama")
    with Float64():
        for (ids, labels), old, advantage in zip(documents(), old_logps(), ADVANTAGES, strict=True):
            log_probs = torch.log_softmax(plain(input_ids=ids[None]).logits[0, :-1], dim=-1)
            counted = labels[1:] != -100
            own = log_probs[counted].gather(-1, labels[1:][counted].unsqueeze(-1)).squeeze(-1)
            before = torch.where(old[1:][counted].isnan(), own.detach(), old[1:][counted])
            ratio = (own - before).exp()
            losses.append(-torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.3) * advantage).sum())
            lengths.append(int(counted.sum()))
        divisors = {"dapo": [sum(lengths)] * 4, "grpo": [4 * length for length in lengths], "dr_grpo": [4 * 50] * 4}
        total = sum(loss / divisor for loss, divisor in zip(losses, divisors[kind], strict=True))
        total.backward()
    expected = {"loss": total.detach(), **gradients_of(plain)}

    batch = packed()
    rows = [torch.cat(old_logps()[first : first + 2]) for first in (0, 2)]
    batch["old_logps"] = torch.stack([torch.cat([row, row.new_zeros(24 - len(row))]) for row in rows])
    models = [tiny_model("llama") for _ in range(sp_size)]
    shards = [shard(batch, Topology(rank, sp_size, sp_size)) | {"advantages": ADVANTAGES} for rank in range(sp_size)]

    def run(group: SequenceGroup | None) -> tuple[Tensor, Tensor]:
        rank = 0 if group is None else group.rank
        objective = SampledPolicy(kind, 0.1, 0.3, max_completion_length=50, group=group)
        own = apply_settings(models[rank], tiny_settings(sp_size), sequence_group=group)
        counts[rank] = objective.num_items(shards[rank])
        with Float64():
            measured = objective.measure(own, shards[rank], sum(lengths) if kind == "dapo" else 4)
            measured.loss.backward()
        return measured.loss.detach(), measured.metrics["clip_ratio/region_mean"]

    counts = [0] * sp_size
    results = [run(None)] if sp_size == 1 else run_simulated(run, sp_size)
    assert sum(counts) == (sum(lengths) if kind == "dapo" else 4)
    of_ranks = [gradients_of(own) for own in models]
    found = {"loss": sum(loss for loss, _ in results)}
    found |= {name: sum(each[name] for each in of_ranks) for name in of_ranks[0]}
    # Log-probabilities of a model in fp64 are fp32 where they leave it.
    assert_close(found, expected, 1e-6)
    clipped, tokens = sum(metrics for _, metrics in results).tolist()
    assert tokens == sum(lengths)
    assert 0 < clipped < tokens


def training_steps(rank: int) -> list[tuple[float, float]]:
    from mst_ds.training.loop import train_step

    group, topology = new_sequence_group(2), Topology(rank, 2, 2)
    model = apply_settings(tiny_model("llama").float(), tiny_settings(2), zero_stage=3, sequence_group=group)
    engine = build_engine(model, zero_optimization=zero_block(3))
    batch = sharded_batch(packed(), topology, 1)
    objective = PairedPreferences(**OBJECTIVES["sigmoid"], group=group)
    results = [train_step(engine, [batch], objective=objective) for _ in range(3)]
    engine.destroy()
    return [(result.loss, result.grad_norm) for result in results]


@pytest.mark.slow
def test_training_steps_under_zero_3() -> None:
    """The first as one process has it; and that preferences are learnt."""
    expected = plain_step("sigmoid")
    norm = torch.stack([grad.norm() for name, grad in expected.items() if name != "loss"]).norm()
    found, others = run_ranks(training_steps, 2)
    assert found == others
    assert found[0] == pytest.approx((expected["loss"].item(), norm.item()), rel=1e-4)
    assert found[2][0] < found[1][0] < found[0][0]


def test_without_a_table_each_row_is_a_document() -> None:
    batch = shard(one_a_row(), Topology(0, 1, 1))
    del batch["document_table"], batch["position_ids"]
    objective, model = PairedPreferences(**OBJECTIVES["sigmoid"]), tiny_model("llama")
    apply_settings(model, tiny_settings())
    with Float64():
        loss = objective.measure(model, {**batch, "ref_logps": REF}, 2).loss
        loss.backward()
    assert_close({"loss": loss.detach(), **gradients_of(model)}, plain_step("sigmoid"), EXACT)


def test_a_router_loss_counts_as_in_cross_entropy() -> None:
    model, batch = tiny_model("qwen3-moe"), {**shard(packed(), Topology(0, 1, 1)), "ref_logps": REF}
    apply_settings(model, tiny_settings())
    objective, inputs = PairedPreferences(), {name: each for name, each in batch.items() if name != "ref_logps"}
    without = objective.measure(model, batch, 4).loss
    model.config.output_router_logits = True
    added = objective.measure(model, batch, 4).loss - without
    aux_loss = model(**inputs, return_log_probs=True).aux_loss
    assert added.item() == pytest.approx(model.router_aux_loss_coef * aux_loss.item() * 2 / 4, rel=1e-4)


def test_sums_of_long_documents_are_not_rounded_to_fp32() -> None:
    """Of 10^5 tokens: the difference to a reference would be lost."""
    values = torch.full((1, 100_000), -2.3, dtype=torch.float32)
    batch = {"shift_labels": torch.zeros(1, 100_000, dtype=torch.long)}
    (total,) = Documents.of_batch(batch).sums(values)
    assert total.item() == pytest.approx(100_000 * values[0, 0].item(), abs=1e-6)


def test_a_value_of_a_document_goes_to_its_tokens() -> None:
    """As advantages, and lengths of sequences, go to a policy loss."""
    batch = shard(packed(), Topology(0, 1, 1))
    of_tokens = Documents.of_batch(batch).spread(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    expected = [[1.0] * 11 + [2.0] * 7 + [0.0] * 6, [3.0] * 9 + [4.0] * 13 + [0.0] * 2]
    assert of_tokens.tolist() == expected


def test_what_are_no_pairs_is_refused() -> None:
    batch = shard(packed(), Topology(0, 1, 1))
    model = apply_settings(tiny_model("llama"), tiny_settings())
    with pytest.raises(ValueError, match=r"ref_logps must be \(4,\), one for each document; got none"):
        PairedPreferences().measure(model, batch, 2)
    with pytest.raises(ValueError, match=r"one for each document; got \(3,\)"):
        PairedPreferences().measure(model, {**batch, "ref_logps": REF[:3]}, 2)
    with pytest.raises(ValueError, match="3 documents are no pairs"):
        PairedPreferences().num_items(shard({name: each[:3] for name, each in one_a_row().items()}, Topology(0, 1, 1)))
    with pytest.raises(ValueError, match="sharded for 2 ranks, and its sequence group has 1"):
        Documents.of_batch(shard(packed(), Topology(0, 2, 2)))
