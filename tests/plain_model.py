"""What a patched model is compared with: loss and gradients of the plain one, and batches for both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# The models are fp64. But transformers computes the loss, and most norms and rotary embeddings, in fp32 in any model,
# and rounding to fp32 turns a last-bit difference of the fp64 input into one of 6e-8.
TOLERANCE = 1e-6


def make_batch(length: int = 29, vocab_size: int = 97) -> dict[str, Tensor]:
    """Two sequences whose labels are ignored in a part of the first, the whole start of the second."""
    generator = torch.Generator().manual_seed(1)
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


def loss_and_gradients(model: torch.nn.Module, **batch: Any) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


def assert_close(
    actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], tolerance: float = TOLERANCE
) -> None:
    """Each by its norm; what the loss does not depend on may be None in the one and 0 in the other."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None or not actual[name].any(), name
        else:
            # The gradient of a single number is a sum in which much may cancel.
            floor = 1e-2 if value.numel() == 1 else 0.0
            error = (actual[name] - value).norm() / max(value.norm(), floor)
            assert error <= tolerance, f"{name}: relative error {error:.1e}"
