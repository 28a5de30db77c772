"""What a patched model is compared with: loss and gradients of the plain one, and batches for both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

# The models are fp64. But transformers computes the loss, and most norms and rotary embeddings, in fp32 in any model,
# and rounding to fp32 turns a last-bit difference of the fp64 input into one of 6e-8.
TOLERANCE = 1e-6


def make_batch(length: int = 29, vocab_size: int = 97, *, seed: int = 1) -> dict[str, Tensor]:
    """Two sequences whose labels are ignored in a part of the first, the whole start of the second."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab_size, (2, length), generator=generator)
    labels = ids.clone()
    labels[0, 5:9] = labels[1, :20] = -100
    return {"input_ids": ids, "labels": labels}


def shift(labels: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
    """Each token's target: none for the last, for the last of a packed document, and across padding."""
    shifted = pad(labels[:, 1:], (0, 1), value=-100)
    if position_ids is not None:
        shifted[:, :-1][position_ids[:, 1:] == 0] = -100
    return shifted if attention_mask is None else shifted.masked_fill(attention_mask == 0, -100)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """By name, of the parameters that have one."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def loss_and_gradients(model: nn.Module, **batch: Any) -> dict[str, Tensor]:
    """Of one forward and backward."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Each by its norm; what the loss does not depend on may have no gradient in the one and 0 in the other."""
    over = {}
    for name, value in expected.items():
        found = actual.get(name, torch.zeros_like(value))
        # The gradient of a single number is a sum in which much may cancel.
        floor = 1e-2 if value.numel() == 1 else 0.0
        error = float((found - value).norm() / max(value.norm(), floor))
        # Not `>`: a NaN must not pass for small.
        if not error <= tolerance and (name in actual or value.any()):
            over[name] = error
    over |= {name: math.inf for name in actual.keys() - expected.keys() if actual[name].any()}
    assert not over, f"off by {max(over.values()):.1e}: {', '.join(over)}"
