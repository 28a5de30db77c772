"""A tiny model, data for it, and what one process with the plain model makes of them: the reference of every test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from error_budget import relative_errors
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mst_ds.data import IGNORE_INDEX, Batch
from mst_ds.settings import Settings

VOCAB_SIZE = 99
LEARNING_RATE = 1e-3


def tiny_llama(**dimensions: Any) -> LlamaForCausalLM:
    """The same weights in every process. Six query heads and two key/value heads: no number that sp 4 divides."""
    defaults = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB_SIZE,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(defaults | dimensions))).train()


def samples(count: int, seq_len: int) -> Batch:
    """`count` samples of random tokens; each has another number of ignored labels, the last only ignored ones."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, VOCAB_SIZE, (count, seq_len), generator=generator)
    labels = input_ids.clone()
    for index in range(count):
        labels[index, 3 : 3 + 5 * index] = IGNORE_INDEX
    if count > 1:
        labels[-1] = IGNORE_INDEX
    return {"input_ids": input_ids, "labels": labels}


def tiny_settings(sp_size: int = 1, **settings: Any) -> Settings:
    """With chunks of uneven length everywhere, and recompute."""
    return replace(Settings(sp_size=sp_size, mlp_chunks=4, loss_chunks=3, recompute=True), **settings)


@dataclass(frozen=True)
class Outcome:
    """The loss of each optimizer step, and the gradients of the first by parameter name."""

    losses: list[float]
    gradients: dict[str, Tensor]

    def worst_gradient_error(self, reference: Outcome) -> tuple[float, str]:
        """The largest relative error (Frobenius norm) of a gradient, and whose it is."""
        errors = relative_errors(self.gradients, reference.gradients)
        name = max(errors, key=errors.__getitem__)
        return errors[name], name

    def worst_loss_error(self, reference: Outcome) -> float:
        """The largest relative difference of a step's loss."""
        return max(abs(a - b) / b for a, b in zip(self.losses, reference.losses, strict=True))


def plain_training(model: nn.Module, batch: Batch, steps: int) -> Outcome:
    """AdamW steps of the plain model's trainable parameters on the whole batch, in one process."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=LEARNING_RATE)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in trainable.items()}
        optimizer.step()
    return Outcome(losses, gradients)


def rows(batch: Batch, indices: Sequence[int]) -> Batch:
    """Some samples of a batch."""
    return {name: tensor[list(indices)] for name, tensor in batch.items()}
