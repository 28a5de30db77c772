"""Logits of a patched model: not computed with a loss unless they are asked for, and never built unawares."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from mst_ds.patching.patched import PatchedModel

_WORTH_A_WARNING = 2**30  # bytes


class NoLogitsError(ValueError, AttributeError):
    """Logits were used that a plan has left out. An AttributeError as well, so that `hasattr` stays a question."""

    def __init__(self) -> None:
        super().__init__(
            "a model with a plan of mst_ds computes its loss in chunks and no logits: pass skip_logits=False, or "
            "logits_to_keep=N for the last N tokens, beside the labels, or call it without labels"
        )


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise NoLogitsError


class LogitsLeftOutByThePlan:
    """Stands for logits that were not computed: it may be handed around, and every use of it says why.

    Its name is part of what other libraries say of it.
    """

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # pickle, copy and others ask whether it is there
            raise AttributeError(name)
        raise NoLogitsError

    __getitem__ = __len__ = __iter__ = __bool__ = __array__ = __float__ = _refuse
    __neg__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = _refuse
    __torch_function__ = classmethod(_refuse)


def take_logits_wanted(kwargs: dict[str, Any], *, wants_loss: bool) -> int | Tensor | None:
    """Take out of a forward's arguments what logits it wants beside its loss.

    `skip_logits`, an argument of the package liger-kernel, is False where all are wanted.

    Returns:
        `logits_to_keep`: the last so many tokens', 0 for all, or a tensor of indices; None where none are wanted.

    Raises:
        ValueError: indices that are not one row, or neither loss nor logits are wanted.
    """
    skip = kwargs.pop("skip_logits", None)
    if not wants_loss:
        if skip:
            raise ValueError("skip_logits is true, and there are no labels: pass labels, or leave skip_logits out")
        return None
    to_keep: int | Tensor | None = kwargs.pop("logits_to_keep", None)
    if isinstance(to_keep, Tensor) and to_keep.dim() != 1:
        raise ValueError(f"logits_to_keep beside labels must be a number or (tokens,); got {tuple(to_keep.shape)}")
    if skip or (skip is None and _means_all(to_keep)):
        return None
    return 0 if to_keep is None else to_keep


def _means_all(logits_to_keep: int | Tensor | None) -> bool:
    return logits_to_keep is None or (isinstance(logits_to_keep, int) and logits_to_keep == 0)


def compute_logits(patched: PatchedModel, hidden_states: Tensor, to_keep: int | Tensor) -> Tensor:
    """(B, L, H) -> (B, tokens kept, V), as the model's own forward gives them."""
    kept = slice(-to_keep, None) if isinstance(to_keep, int) else to_keep
    return patched.loss.logits(patched.loss.head(hidden_states[:, kept]))


def warn_of_logits(patched: PatchedModel, kwargs: Mapping[str, Any]) -> None:
    """In training without labels the logits are built whole, which nobody may have asked for."""
    model = patched.model
    if not (torch.is_grad_enabled() and model.training and _means_all(kwargs.get("logits_to_keep"))):
        return
    inputs = kwargs["input_ids"] if kwargs["input_ids"] is not None else kwargs["inputs_embeds"]
    size = math.prod(inputs.shape[:2]) * model.config.get_text_config().vocab_size * model.dtype.itemsize
    if size >= _WORTH_A_WARNING:
        warnings.warn(
            f"without labels a model with a plan of mst_ds builds its logits whole, {size / 2**30:.1f} GiB and their "
            "gradient: label smoothing and loss functions of one's own take out the labels, which the loss in chunks "
            "needs",
            stacklevel=2,
        )
