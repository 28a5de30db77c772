"""Losses of preferences and policies: by their formulas over all logits in fp64, and as TRL computes them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mst_ds import chunked_log_probs
from mst_ds.objectives import (
    Documents,
    dpo_loss,
    ipo_loss,
    kto_kl,
    kto_loss,
    policy_loss,
    policy_metrics,
    preference_metrics,
    simpo_loss,
)

ROWS, LENGTH, HIDDEN, VOCAB = 6, 13, 16, 31
BETA = 0.3


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


class Case:
    """Hidden states, a head, labels whose number differs from row to row, and what a reference says of the rows."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(ROWS, LENGTH, HIDDEN, dtype=torch.float64)
        self.weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64) / 4
        self.labels = torch.randint(VOCAB, (ROWS, LENGTH))
        for row in range(ROWS):
            self.labels[row, : 2 + row] = -100
        self.mask = self.labels != -100
        self.lengths = self.mask.sum(dim=1)
        self.ref = -3.4 * self.lengths + torch.randn(ROWS, dtype=torch.float64)
        self.advantages = torch.randn(ROWS, dtype=torch.float64)
        # Ratios on both sides of what is clipped.
        self.drift = 0.5 * torch.randn(ROWS, LENGTH, dtype=torch.float64)
        self.label = torch.tensor([True, False, False, True, True, False])
        self.kl = torch.tensor(0.4, dtype=torch.float64)

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        logits = x @ weight.T
        shares = torch.exp(logits) / torch.exp(logits).sum(dim=-1, keepdim=True)
        of_labels = shares.gather(-1, self.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.log(of_labels) * self.mask

    def ours(self, x: Tensor, weight: Tensor) -> Tensor:
        return chunked_log_probs(x, weight, self.labels, chunks=5)

    def old(self) -> Tensor:
        return (self.plain(self.x, self.weight) + self.drift) * self.mask


CASE = Case()
CHOSEN, REJECTED = slice(0, None, 2), slice(1, None, 2)


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    return values[CHOSEN], values[REJECTED]


def rows_of(log_probs: Tensor) -> Tensor:
    return Documents.of_batch({"shift_labels": CASE.labels}).sums(log_probs)


def plain_difference(log_probs: Tensor, *, mean: bool, has_reference: bool = True) -> Tensor:
    total = log_probs.sum(dim=1) - (CASE.ref if has_reference else 0)
    chosen, rejected = halves(total / CASE.lengths if mean else total)
    return chosen - rejected


def plain_smoothed(logits: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * torch.log(sigma(logits)) - smoothing * torch.log(sigma(-logits))


def plain_kto(log_probs: Tensor) -> Tensor:
    log_ratios = log_probs.sum(dim=1) - CASE.ref
    desirable = 1.5 * (1 - sigma(BETA * (log_ratios - CASE.kl)))
    return torch.where(CASE.label, desirable, 0.7 * (1 - sigma(BETA * (CASE.kl - log_ratios))))


def plain_policy(log_probs: Tensor, kind: str, *, is_old: bool = True) -> Tensor:
    """Token by token, in Python."""
    old, total = CASE.old(), torch.zeros((), dtype=torch.float64)
    for row in range(ROWS):
        terms = []
        for t in CASE.mask[row].nonzero().flatten().tolist():
            was = old[row, t] if is_old else log_probs[row, t].detach()
            ratio, advantage = torch.exp(log_probs[row, t] - was), CASE.advantages[row]
            low, high = (1 - 0.2) * advantage, (1 + 0.3) * advantage
            clipped = low if ratio < 1 - 0.2 else high if ratio > 1 + 0.3 else ratio * advantage
            terms.append(-torch.min(ratio * advantage, clipped))
        of_row = torch.stack(terms).sum()
        divisors = {"grpo": ROWS * len(terms), "dapo": int(CASE.mask.sum()), "dr_grpo": ROWS * 20}
        total = total + of_row / divisors[kind]
    return total


def ours_policy(log_probs: Tensor, kind: Any, *, is_old: bool = True) -> Tensor:
    return policy_loss(
        log_probs,
        CASE.mask,
        CASE.advantages,
        old_log_probs=CASE.old() if is_old else None,
        epsilon=0.2,
        epsilon_high=0.3,
        loss_type=kind,
        max_completion_length=20 if kind == "dr_grpo" else None,
    )


LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "dpo": (
        lambda logps: dpo_loss(*halves(rows_of(logps)), *halves(CASE.ref), beta=BETA),
        lambda logps: plain_smoothed(BETA * plain_difference(logps, mean=False), 0.0),
    ),
    "dpo smoothed": (
        lambda logps: dpo_loss(*halves(rows_of(logps)), *halves(CASE.ref), beta=BETA, label_smoothing=0.2),
        lambda logps: plain_smoothed(BETA * plain_difference(logps, mean=False), 0.2),
    ),
    "ipo": (
        lambda logps: ipo_loss(*halves(rows_of(logps)), *halves(CASE.ref), *halves(CASE.lengths), beta=BETA),
        lambda logps: (plain_difference(logps, mean=True) - 1 / (2 * BETA)) ** 2,
    ),
    "simpo": (
        lambda logps: simpo_loss(*halves(rows_of(logps)), *halves(CASE.lengths), beta=2.5, gamma_beta_ratio=0.4),
        lambda logps: plain_smoothed(2.5 * plain_difference(logps, mean=True, has_reference=False) - 1.0, 0.0),
    ),
    "kto": (
        lambda logps: kto_loss(
            rows_of(logps), CASE.ref, CASE.label, CASE.kl, beta=BETA, desirable_weight=1.5, undesirable_weight=0.7
        ),
        plain_kto,
    ),
    **{
        kind: (lambda logps, kind=kind: ours_policy(logps, kind), lambda logps, kind=kind: plain_policy(logps, kind))
        for kind in ("grpo", "dapo", "dr_grpo")
    },
    "on-policy": (
        lambda logps: ours_policy(logps, "grpo", is_old=False),
        lambda logps: plain_policy(logps, "grpo", is_old=False),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_the_formula_over_all_logits(name: str) -> None:
    results = []
    for log_probs, loss in zip((CASE.ours, CASE.plain), LOSSES[name], strict=True):
        x, weight = CASE.x.clone().requires_grad_(), CASE.weight.clone().requires_grad_()
        losses = loss(log_probs(x, weight))
        results.append((losses.detach(), *torch.autograd.grad(losses.mean(), (x, weight))))
    assert all(each.any() for each in results[1])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_what_is_clipped_on_either_side_is_counted() -> None:
    log_probs = CASE.plain(CASE.x, CASE.weight)
    found = policy_metrics(
        log_probs, CASE.mask, CASE.advantages, old_log_probs=CASE.old(), epsilon=0.2, epsilon_high=0.3
    )
    ratios, positive = torch.exp(log_probs - CASE.old()), (CASE.advantages > 0).unsqueeze(1)
    low, high = CASE.mask & (ratios < 0.8) & ~positive, CASE.mask & (ratios > 1.3) & positive
    expected = {"low": low.sum(), "high": high.sum(), "region": low.sum() + high.sum()}
    assert min(expected.values()) > 0
    for name, count in expected.items():
        assert found[f"clip_ratio/{name}_mean"].item() == pytest.approx(count.item() / CASE.mask.sum().item())


def test_a_policy_loss_adds_up_over_shards_of_packed_rows() -> None:
    """With the step's counts: sequences of any rows, tokens of any rank."""
    log_probs, lengths = CASE.plain(CASE.x, CASE.weight), CASE.lengths.unsqueeze(1)
    for kind, items in (("grpo", ROWS), ("dapo", int(CASE.mask.sum())), ("dr_grpo", ROWS)):
        parts = [
            policy_loss(
                log_probs[:, part],
                CASE.mask[:, part],
                CASE.advantages.unsqueeze(1).expand(ROWS, LENGTH)[:, part],
                old_log_probs=CASE.old()[:, part],
                epsilon_high=0.3,
                loss_type=kind,  # type: ignore[arg-type]
                num_items=items,
                sequence_lengths=lengths,
                max_completion_length=20,
            )
            for part in (slice(0, 5), slice(5, None))
        ]
        torch.testing.assert_close(parts[0] + parts[1], ours_policy(log_probs, kind), rtol=1e-12, atol=0)


def test_without_a_token_that_counts_a_policy_loss_is_zero() -> None:
    log_probs = torch.zeros(2, 3, requires_grad=True)
    for kind in ("grpo", "dapo"):
        loss = policy_loss(log_probs, torch.zeros(2, 3), torch.ones(2), loss_type=kind)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(loss, log_probs)
        assert loss == 0
        assert not grad.any()


def test_what_makes_no_sense_is_refused() -> None:
    four = torch.zeros(4)
    with pytest.raises(ValueError, match=r"label_smoothing must be at least 0 and below 0\.5, got 0\.5"):
        dpo_loss(four, four, four, four, label_smoothing=0.5)
    with pytest.raises(ValueError, match="loss_type must be one of grpo, dapo, dr_grpo; got 'bnpo'"):
        policy_loss(four[None], four[None], four[:1], loss_type="bnpo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs max_completion_length"):
        policy_loss(four[None], four[None], four[:1], loss_type="dr_grpo")


def test_the_reference_point_of_kto_is_never_negative_and_has_no_gradient() -> None:
    policy = torch.tensor([-3.0, -5.0], requires_grad=True)
    assert kto_kl(policy, torch.tensor([-4.0, -5.0])) == 0.5
    assert kto_kl(policy, torch.tensor([-2.0, -5.0])) == 0
    assert not kto_kl(policy, torch.zeros(2)).requires_grad


# TRL's own losses, called with what they read of a trainer


def as_a_trainer(**settings: Any) -> Any:
    """What `_compute_loss` asks of the trainer and of accelerate, in one process."""
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, num_processes=1, device=CASE.x.device)
    same.reduce = lambda x, reduction: x
    defaults = {
        "accelerator": same,
        "model": SimpleNamespace(training=False),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "beta": BETA,
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**(defaults | settings))


def as_a_model(log_probs: Tensor) -> Callable[..., Any]:
    """Whose fused head gives these, one less than a row has tokens."""
    zeros = torch.zeros_like(log_probs)
    output = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return lambda **_: output


def completions() -> dict[str, Tensor]:
    """A token more than there are labels: TRL shifts by itself."""
    mask = torch.cat([torch.zeros(ROWS, 1, dtype=torch.long), CASE.mask.long()], dim=1)
    ids = torch.zeros_like(mask)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}


def trl_of_pairs(loss_type: str) -> tuple[Callable[[Tensor], Tensor], dict[str, float]]:
    from trl.trainer.dpo_trainer import DPOTrainer

    own = as_a_trainer(
        loss_types=[loss_type], loss_weights=[1.0], ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False
    )
    metrics: dict[str, float] = {}
    order = torch.cat([torch.arange(ROWS)[half] for half in (CHOSEN, REJECTED)])
    chosen, rejected = halves(CASE.ref)

    def loss(log_probs: Tensor) -> Tensor:
        inputs = {name: tensor[order] for name, tensor in completions().items()}
        inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        value = DPOTrainer._compute_loss(own, as_a_model(log_probs[order]), inputs, False)
        metrics.update({name: values[-1] for name, values in own._metrics["eval"].items()})
        return value

    return loss, metrics


def trl_of_kto() -> Callable[[Tensor], Tensor]:
    from trl.trainer.kto_trainer import KTOTrainer

    own = as_a_trainer(calculate_KL=True, loss_type="kto", desirable_weight=1.5, undesirable_weight=0.7)
    own._compute_kl_logps = lambda model, batch: batch["ref_KL_logps"] + CASE.kl
    inputs = {**completions(), "label": CASE.label, "ref_logps": CASE.ref, "ref_KL_logps": CASE.ref}
    return lambda log_probs: KTOTrainer._compute_loss(own, as_a_model(log_probs), inputs, False)


def trl_of_policy(kind: str) -> tuple[Callable[[Tensor], Tensor], dict[str, float]]:
    from trl.trainer.grpo_trainer import GRPOTrainer

    metrics: dict[str, float] = {}
    own = as_a_trainer(
        loss_type=kind,
        beta=0.0,
        epsilon_low=0.2,
        epsilon_high=0.3,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        use_vllm=False,
        max_completion_length=20,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, steps_per_generation=1),
    )
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
        "completion_ids": torch.zeros(ROWS, LENGTH, dtype=torch.long),
        "completion_mask": CASE.mask.long(),
        "advantages": CASE.advantages,
        "old_per_token_logps": CASE.old(),
        "num_items_in_batch": CASE.mask.sum(),
    }

    def loss(log_probs: Tensor) -> Tensor:
        own._get_per_token_logps_and_entropies = lambda *args, **kwargs: (log_probs, torch.zeros_like(log_probs), None)
        value = GRPOTrainer._compute_loss(own, None, inputs)
        metrics.update({name: values[-1] for name, values in own._metrics["eval"].items()})
        return value

    return loss, metrics


def assert_as_trl(name: str, theirs: Callable[[Tensor], Tensor]) -> None:
    log_probs, results = CASE.plain(CASE.x, CASE.weight), []
    for loss in (LOSSES[name][0], theirs):
        own = log_probs.clone().requires_grad_()
        value = loss(own).mean()
        results.append((value.detach(), *torch.autograd.grad(value, own)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_losses_gradients_and_metrics_are_those_of_trl() -> None:
    pytest.importorskip("trl", reason="needs trl, which is no dependency")
    log_probs = CASE.plain(CASE.x, CASE.weight)
    of_dpo, metrics = trl_of_pairs("sigmoid")
    assert_as_trl("dpo", of_dpo)
    of_rows = log_probs.sum(dim=1)
    ours = preference_metrics(*halves(of_rows), *halves(BETA * (of_rows - CASE.ref)))
    means = {name: values.mean().item() for name, values in ours.items()}
    assert means == pytest.approx({name: metrics[name] for name in ours})
    assert not math.isclose(means["rewards/accuracies"], 1)
    assert_as_trl("ipo", trl_of_pairs("ipo")[0])
    assert_as_trl("kto", trl_of_kto())
    for kind in ("grpo", "dapo", "dr_grpo"):
        of_policy, metrics = trl_of_policy(kind)
        assert_as_trl(kind, of_policy)
    clipped = policy_metrics(
        log_probs, CASE.mask, CASE.advantages, old_log_probs=CASE.old(), epsilon=0.2, epsilon_high=0.3
    )
    assert {name: each.item() for name, each in clipped.items()} == pytest.approx(
        {name: metrics[name] for name in clipped}
    )
