"""The LM head and cross-entropy in plain torch, and tensors to run them on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_ds.minisequence import chunked_loss

HIDDEN, VOCAB = 128, 499
ONE = torch.ones(())


def plain_loss(
    labels: Tensor,
    tensors: dict[str, Tensor],
    *,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    logits = plain_logits(tensors, logit_scale, logit_softcap).flatten(0, -2)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits, labels.flatten(), reduction=reduction, ignore_index=ignore_index)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def plain_logits(tensors: dict[str, Tensor], logit_scale: float = 1.0, logit_softcap: float | None = None) -> Tensor:
    logits = F.linear(tensors["x"], tensors["weight"], tensors.get("bias"))
    # As transformers does: the loss of 16-bit logits is computed in fp32.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    return logits if logit_softcap is None else torch.tanh(logits / logit_softcap) * logit_softcap


def plain_log_probs(
    labels: Tensor,
    tensors: dict[str, Tensor],
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    **transform: float,
) -> Tensor:
    """Of each label under the softmax over all logits at once; 0 where ignored."""
    log_probs = torch.log_softmax(plain_logits(tensors, **transform) / temperature, dim=-1)
    valid = labels != ignore_index
    return log_probs.gather(-1, labels.where(valid, 0).unsqueeze(-1)).squeeze(-1).where(valid, 0)


def make_tensors(
    dtype: torch.dtype, shape: tuple[int, ...], *, bias: bool = True, hidden: int = HIDDEN, vocab: int = VOCAB
) -> dict[str, Tensor]:
    """Hidden states and a head whose logits have a spread of 2, so that the softmax is neither flat nor one-hot."""
    torch.manual_seed(0)
    tensors = {"x": torch.randn(*shape, hidden), "weight": torch.randn(vocab, hidden) * 2 * hidden**-0.5}
    if bias:
        tensors["bias"] = torch.randn(vocab)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def make_labels(shape: tuple[int, ...], *, ignored: float = 0.3, vocab: int = VOCAB) -> Tensor:
    """Labels whose ignored part gathers at the front: first chunks have few valid ones, or none."""
    labels = torch.randint(vocab, shape)
    labels.view(-1)[: int(ignored / 2 * labels.numel())] = -100
    return labels.masked_fill_(torch.rand(shape) < ignored / 2, -100)


def our_loss(chunks, labels, tensors, **kwargs):
    return chunked_loss(tensors["x"], tensors["weight"], labels, chunks=chunks, bias=tensors.get("bias"), **kwargs)
