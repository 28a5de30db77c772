"""The project's promise: whatever the topology, ZeRO stage and chunk counts, the plain model's losses and gradients.

The reference is one process with the unpatched model and all samples in one batch; the candidate goes the way of a
real run: shard, patched model, DeepSpeed engine, `train_step`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from distributed import run_ranks
from steps import build_engine, train, zero_block
from tiers import slow_but_for
from tiny import Outcome, plain_training, rows, samples, tiny_llama, tiny_settings
from torch.utils._python_dispatch import TorchDispatchMode

from mst_ds import apply_settings
from mst_ds.data import shard
from mst_ds.topology import Topology
from mst_ds.training.loop import evaluate

# Neither 2 nor 4 divides it, and a shard has tokens for 16 chunks of at least 4.
SEQ_LEN = 131
STEPS = 3
# fp32 sums in another order; measured: gradients up to 6e-7, losses up to 2e-7.
TOLERANCE = 1e-5


def patched_llama(topology: Topology, stage: int, dimensions: dict[str, Any] | None = None, **settings: Any) -> Any:
    """`tiny_llama` under a plan with these settings."""
    model = tiny_llama(**(dimensions or {}))
    return apply_settings(model, tiny_settings(topology.sp_size, **settings), zero_stage=stage)


def train_sharded(
    topology: Topology,
    *,
    stage: int,
    batch_size: int,
    micro_batches: int = 1,
    reduce_scatter: bool = True,
    dimensions: dict[str, Any] | None = None,
    **settings: Any,
) -> Outcome:
    """Train on `batch_size` samples, split over the data-parallel ranks and micro-batches."""
    per_micro_batch = batch_size // topology.dp_size // micro_batches
    data = samples(batch_size, SEQ_LEN)
    engine = build_engine(
        patched_llama(topology, stage, dimensions, **settings),
        gradient_accumulation_steps=micro_batches,
        zero_optimization=zero_block(stage, keep_gathered=True, reduce_scatter=reduce_scatter),
    )
    first = topology.dp_rank * micro_batches * per_micro_batch
    shards = [
        shard(rows(data, range(start, start + per_micro_batch)), topology, layer_chunks=settings.get("layer_chunks", 1))
        for start in range(first, first + micro_batches * per_micro_batch, per_micro_batch)
    ]
    outcome = train(engine, shards, STEPS)
    engine.destroy()
    return outcome if topology.rank == 0 else Outcome(outcome.losses, {})


def every_stage(rank: int, world_size: int, sp_size: int, batch_size: int) -> dict[str, Outcome]:
    topology = Topology(rank, world_size, sp_size)
    outcomes = {}
    for stage, reduce_scatter in itertools.product(range(4), (True, False)):
        if stage == 0 and not reduce_scatter:
            continue  # ZeRO-0 has no such setting
        # Every stage by chunks of a layer, and as many as its group has; those without reduce-scatter keep everything.
        streamed = {"layer_chunks": 4 * (1 + topology.dp_rank), "keep_attention": stage % 2 == 1}
        outcomes[f"ZeRO-{stage} reduce_scatter={reduce_scatter}"] = train_sharded(
            topology,
            batch_size=batch_size,
            stage=stage,
            reduce_scatter=reduce_scatter,
            mlp_chunks=2 + 3 * rank,
            loss_chunks=1 + 2 * rank,
            recompute=reduce_scatter,
            offload_activations=reduce_scatter and stage == 3,
            # Nothing waits for it, so that ranks may differ in this too.
            keep_mlp=rank % 2 == 0,
            head_groups=1 + stage % 2,
            **(streamed if reduce_scatter else {}),
        )
    return outcomes


def assert_exact(candidate: Outcome, reference: Outcome, setting: str = "") -> None:
    error, name = candidate.worst_gradient_error(reference)
    assert error <= TOLERANCE, f"{setting}: gradient of {name} is off by {error:.1e}"
    error = candidate.worst_loss_error(reference)
    assert error <= TOLERANCE, f"{setting}: a loss is off by {error:.1e}"


@pytest.mark.parametrize("mesh", slow_but_for([(2, 2)], [(1, 1), (2, 2), (2, 1), (4, 4), (4, 2)]), ids=str)
def test_every_zero_stage_trains_as_one_process(mesh: tuple[int, int]) -> None:
    world_size, sp_size = mesh
    # peers.md rows 5 and 6: chunk counts differ from rank to rank, and no stage scales gradients by sp. Those of layers
    # differ from sequence to sequence.
    batch_size = 2 * (world_size // sp_size)
    reference = plain_training(tiny_llama(), samples(batch_size, SEQ_LEN), STEPS)
    outcomes = run_ranks(every_stage, world_size, world_size, sp_size, batch_size)
    for setting, candidate in outcomes[0].items():
        assert_exact(candidate, reference, setting)
    for of_rank in outcomes[1:]:
        assert [outcome.losses for outcome in of_rank.values()] == [
            outcome.losses for outcome in outcomes[0].values()
        ], "ranks report different losses"


def gather_after_forwards(rank: int) -> list[float]:
    """The loss of an evaluation before and after steps, each followed by a gather of all that there is."""
    import deepspeed

    topology = Topology(rank, 2, 2)
    # A few parameters ahead, as the shipped JSON has it.
    zero = zero_block(3, keep_gathered=True, stage3_prefetch_bucket_size=1000)
    engine = build_engine(patched_llama(topology, 3), zero_optimization=zero)
    batch, losses = shard(samples(1, SEQ_LEN), topology), []
    # It takes some steps until it fetches ahead again, for forward and backward.
    for steps in (0, 4):
        train(engine, [batch], steps)
        # The second forward knows what the first one fetched.
        losses.append(evaluate(engine, [batch] * 2)[0])
        for parameter in engine.module.parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                pass
    engine.destroy()
    return losses


def test_parameters_can_be_gathered_after_an_evaluation() -> None:
    """As an export does: a forward alone leaves in flight what ZeRO-3 has fetched ahead for a backward."""
    first, *others = run_ranks(gather_after_forwards, 2)
    assert first[1] < first[0]
    assert others == [first]


def accumulate(rank: int, batch_size: int, stage: int) -> list[Outcome]:
    topology = Topology(rank, 2, 2)
    return [train_sharded(topology, batch_size=batch_size, micro_batches=count, stage=stage) for count in (1, 2, 4)]


@pytest.mark.parametrize("stage", slow_but_for([3], range(4)))
def test_accumulation_equals_one_large_batch(stage: int) -> None:
    # The samples have different numbers of ignored labels, one of them no valid label at all.
    reference = plain_training(tiny_llama(), samples(4, SEQ_LEN), STEPS)
    for outcome in run_ranks(accumulate, 2, 4, stage)[0]:
        assert_exact(outcome, reference)


def with_dropout(rank: int, sp_size: int) -> list[Outcome]:
    kept = ({"recompute": False}, {}, {"keep_attention": True}, {"keep_attention": True, "offload_activations": True})
    outcomes = []
    for settings in kept:
        torch.manual_seed(rank)
        dropout = {"attention_dropout": 0.2}
        outcomes.append(
            train_sharded(Topology(rank, 2, sp_size), batch_size=2, stage=3, dimensions=dropout, **settings)
        )
    return outcomes


@pytest.mark.parametrize("sp_size", slow_but_for([2], [1, 2]))
def test_what_is_kept_changes_no_dropout_under_zero3(sp_size: int) -> None:
    first, *others = run_ranks(with_dropout, 2, sp_size)[0]
    plain = plain_training(tiny_llama(), samples(2, SEQ_LEN), STEPS)
    assert first.worst_gradient_error(plain)[0] > 1e-2, "nothing was dropped"
    for outcome in others:
        assert_exact(outcome, first)


NINE_HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}


def nine_heads(rank: int, world_size: int) -> Outcome:
    return train_sharded(Topology(rank, world_size, world_size), batch_size=2, stage=3, dimensions=NINE_HEADS)


@pytest.mark.parametrize("sp_size", slow_but_for([2], [2, 4]))
def test_heads_that_sp_does_not_divide(sp_size: int) -> None:
    reference = plain_training(tiny_llama(**NINE_HEADS), samples(2, SEQ_LEN), STEPS)
    assert_exact(run_ranks(nine_heads, sp_size, sp_size)[0], reference)


class Exchanges(TorchDispatchMode):
    """Counts the all-gathers of a step, and the bytes that they and all-to-alls bring."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "allgather" in func._opname:
            self.seen["gathers"] += 1
            outputs = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            flat = itertools.chain.from_iterable(x if isinstance(x, list | tuple) else [x] for x in outputs)
            self.seen["gathered bytes"] += sum(tensor.nbytes for tensor in flat)
        elif func.namespace == "c10d" and "alltoall" in func._opname:
            self.seen["exchanged bytes"] += args[0].nbytes
        return func(*args, **(kwargs or {}))


def exchanged_per_step(rank: int, keep_gathered: bool, keep_attention: bool) -> list[dict[str, int]]:
    from mst_ds.training.loop import train_step

    topology = Topology(rank, 2, 2)
    counts = []
    for chunks in (1, 4, 16):
        settings = {"layer_chunks": chunks, "mlp_chunks": chunks, "loss_chunks": chunks}
        model = patched_llama(topology, 3, keep_attention=keep_attention, **settings)
        engine = build_engine(model, zero_optimization=zero_block(3, keep_gathered=keep_gathered))
        batch = shard(samples(1, SEQ_LEN), topology, layer_chunks=chunks)
        train_step(engine, [batch])  # the first step traces the order of the parameters
        with Exchanges() as exchanges:
            train_step(engine, [batch])
        counts.append(dict(exchanges.seen))
        engine.destroy()
    return counts


def test_what_is_exchanged_does_not_grow_with_chunks() -> None:
    """All-gathers by number and bytes, and bytes of all-to-alls."""
    parameter_bytes = sum(parameter.nbytes for parameter in tiny_llama().parameters())
    of_settings = []
    for keep in (True, False):
        one, four, sixteen = run_ranks(exchanged_per_step, 2, keep, keep)[0]
        assert one["gathered bytes"] >= parameter_bytes, "the meter saw no gathered parameters"
        assert one["exchanged bytes"] > 0, "the meter saw no all-to-all"
        assert one == four == sixteen
        of_settings.append(one)
    kept, again = of_settings
    assert kept["gathers"] < again["gathers"], "both settings gather everything at once"
    assert kept["gathered bytes"] < again["gathered bytes"], "no backward gathers what the forward has dropped"
    assert kept["exchanged bytes"] < again["exchanged bytes"], "attention is run once with both settings"


def evaluate_sharded(rank: int) -> float:
    from mst_ds.training.loop import evaluate

    topology = Topology(rank, 4, 2)
    engine = build_engine(patched_llama(topology, 3), zero_optimization=zero_block(3))
    data = samples(4, SEQ_LEN)
    batches = [shard(rows(data, [topology.dp_rank * 2 + offset]), topology) for offset in range(2)]
    assert not any(parameter.grad is not None for parameter in engine.module.parameters())
    return evaluate(engine, batches)[0]


@pytest.mark.slow
def test_evaluation_is_the_mean_over_all_tokens() -> None:
    data = samples(4, SEQ_LEN)
    expected = tiny_llama()(input_ids=data["input_ids"], labels=data["labels"]).loss.item()
    for loss in run_ranks(evaluate_sharded, 4):
        assert loss == pytest.approx(expected, rel=TOLERANCE)


def norms_by_stage(rank: int) -> list[float]:
    from mst_ds.training.loop import train_step

    topology = Topology(rank, 2, 2)
    norms = []
    for stage in range(4):
        engine = build_engine(patched_llama(topology, stage), zero_optimization=zero_block(stage))
        norms.append(train_step(engine, [shard(samples(1, SEQ_LEN), topology)]).grad_norm)
        engine.destroy()
    return norms


def test_the_gradient_norm_is_that_of_one_process_at_every_stage() -> None:
    reference = plain_training(tiny_llama(), samples(1, SEQ_LEN), steps=1)
    expected = torch.nn.utils.get_total_norm(list(reference.gradients.values())).item()
    for norms in run_ranks(norms_by_stage, 2):
        assert norms == pytest.approx([expected] * 4, rel=TOLERANCE)
