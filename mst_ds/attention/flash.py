"""Flash attention on CUDA, which takes all documents of a batch, windows and grouped heads in one call."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .documents import Documents
from .hub_kernels import HUB_KERNELS, hub_flash_attention
from .kernel import Attended, Gradients
from .spec import AttentionSpec

aten = torch.ops.aten


@dataclass(frozen=True)
class TorchFlash:
    """A `Kernel`: torch's flash attention, or what `torch.nn.attention` has put in its place. Without softcap.

    Args:
        is_causal: else all queries of a document see all its keys.
    """

    is_causal: bool = True

    def forward(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, documents: Documents) -> Attended:
        output, log_sum_exp, seed, offset, _ = aten._flash_attention_forward(
            *_laid_out(documents, query, key, value),
            *_borders(documents, query, key),
            spec.dropout,
            self.is_causal,
            False,
            scale=spec.scaling,
            **_window(spec, self.is_causal),
        )
        return _attended(documents, query, output, log_sum_exp, (seed, offset))

    def backward(
        self,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attended: Attended,
        spec: AttentionSpec,
        documents: Documents,
    ) -> Gradients:
        draw = next(iter(attended.draws))
        grads = aten._flash_attention_backward(
            *_laid_out(documents, grad_output, query, key, value, attended.output),
            _packed_log_sum_exp(documents, attended.log_sum_exp),
            *_borders(documents, query, key),
            spec.dropout,
            self.is_causal,
            *draw,
            scale=spec.scaling,
            **_window(spec, self.is_causal),
        )
        return _unpacked_gradients(documents, query, grads)


@dataclass(frozen=True)
class FlashPackage:
    """A `Kernel`: the package flash-attn, version 2.7 or a later one of 2, which has a softcap too.

    Args:
        name: of the setting "attention": whether it is the installed one or the hub's.
        is_causal: else all queries of a document see all its keys.
    """

    name: str
    is_causal: bool = True

    def forward(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, documents: Documents) -> Attended:
        package = _flash_2(self.name)
        run = package._flash_attn_forward if documents.are_rows else package._flash_attn_varlen_forward
        output, log_sum_exp, _, seed = run(
            *_laid_out(documents, query, key, value),
            **_package_borders(documents, query, key),
            **_package_arguments(spec, self.is_causal),
            return_softmax=False,
        )
        return _attended(documents, query, output, log_sum_exp, (seed,))

    def backward(
        self,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attended: Attended,
        spec: AttentionSpec,
        documents: Documents,
    ) -> Gradients:
        package = _flash_2(self.name)
        (seed,) = next(iter(attended.draws))
        grad_output, query_, key_, value_, output = _laid_out(
            documents, grad_output, query, key, value, attended.output
        )
        grads = [torch.empty_like(x) for x in (query_, key_, value_)]
        run = package._flash_attn_backward if documents.are_rows else package._flash_attn_varlen_backward
        run(
            grad_output,
            query_,
            key_,
            value_,
            output,
            _packed_log_sum_exp(documents, attended.log_sum_exp),
            *grads,
            **_package_borders(documents, query, key),
            **_package_arguments(spec, self.is_causal),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=seed,
        )
        return _unpacked_gradients(documents, query, grads)


@dataclass(frozen=True)
class Flash3Package:
    """A `Kernel`: flash-attn 3 of the hub, which has a softcap and no dropout.

    Args:
        name: of the setting "attention": its repository. That of vLLM takes a window as a pair, and has no defaults.
        is_causal: else all queries of a document see all its keys.
    """

    name: str
    is_causal: bool = True

    def forward(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, documents: Documents) -> Attended:
        run = hub_flash_attention(self.name)._flash_attn_forward
        starts_q, starts_k, most_q, most_k = _hub_borders(documents, query, key)
        output, log_sum_exp, *_ = run(
            *_laid_out(documents, query, key, value),
            *[None] * 4,  # new keys and values, a second query, where the output goes
            starts_q,
            starts_k,
            *[None] * 3,  # borders of new keys, tokens that count
            most_q,
            most_k,
            *[None] * 9,  # pages of a cache, rotary angles, scales of 8 bits
            spec.scaling,
            self.is_causal,
            **_hub_window(run, spec, self.is_causal),
            softcap=spec.softcap or 0.0,
        )
        return _attended(documents, query, output, log_sum_exp, ())

    def backward(
        self,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attended: Attended,
        spec: AttentionSpec,
        documents: Documents,
    ) -> Gradients:
        run = hub_flash_attention(self.name)._flash_attn_backward
        starts_q, starts_k, most_q, most_k = _hub_borders(documents, query, key)
        given = _laid_out(documents, grad_output, query, key, value, attended.output)
        grads = [torch.empty_like(x) for x in given[1:4]]
        run(
            *given,
            _packed_log_sum_exp(documents, attended.log_sum_exp),
            starts_q,
            starts_k,
            *[None] * 2,  # tokens that count
            most_q,
            most_k,
            *grads,
            spec.scaling,
            self.is_causal,
            **_hub_window(run, spec, self.is_causal),
            softcap=spec.softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return _unpacked_gradients(documents, query, grads)


def _flash_2(name: str) -> Any:
    if name in HUB_KERNELS:
        return hub_flash_attention(name)
    from flash_attn import flash_attn_interface

    return flash_attn_interface


def _laid_out(documents: Documents, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, n, S, D) -> (B, S, n, D); where rows have several documents, all rows' tokens in one: (B * S, n, D)."""
    by_token = [tensor.transpose(1, 2) for tensor in tensors]
    return tuple(by_token if documents.are_rows else [tensor.flatten(0, 1) for tensor in by_token])


def _unpacked(documents: Documents, query: Tensor, tensor: Tensor) -> Tensor:
    """The way back."""
    by_token = tensor if documents.are_rows else tensor.unflatten(0, (len(query), -1))
    return by_token.transpose(1, 2)


def _unpacked_gradients(documents: Documents, query: Tensor, grads: Sequence[Tensor]) -> Gradients:
    of_query, of_key, of_value = (_unpacked(documents, query, grad) for grad in grads)
    return of_query, of_key, of_value


def _attended(
    documents: Documents, query: Tensor, output: Tensor, log_sum_exp: Tensor, draw: tuple[Tensor, ...]
) -> Attended:
    if not documents.are_rows:
        log_sum_exp = log_sum_exp.unflatten(1, (len(query), -1)).transpose(0, 1)  # it is (n, B * S)
    return Attended(_unpacked(documents, query, output), log_sum_exp, [draw])


def _packed_log_sum_exp(documents: Documents, log_sum_exp: Tensor) -> Tensor:
    return log_sum_exp.contiguous() if documents.are_rows else log_sum_exp.transpose(0, 1).flatten(1).contiguous()


def _borders(documents: Documents, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None, int, int]:
    if documents.are_rows:
        return None, None, query.shape[2], key.shape[2]
    borders = documents.borders(query.shape[0], query.shape[2], key.shape[2], query.device)
    return borders.queries, borders.keys, borders.most_queries, borders.most_keys


def _window(spec: AttentionSpec, is_causal: bool) -> dict[str, int]:
    """How many tokens to the left and to the right of a query's own it sees; -1 for all of them."""
    left = -1 if spec.window is None else spec.window - 1
    return {"window_size_left": left, "window_size_right": 0 if is_causal else -1}


def _hub_borders(
    documents: Documents, query: Tensor, key: Tensor
) -> tuple[Tensor | None, Tensor | None, int | None, int | None]:
    return (None, None, None, None) if documents.are_rows else _borders(documents, query, key)


def _hub_window(run: Any, spec: AttentionSpec, is_causal: bool) -> dict[str, Any]:
    window = _window(spec, is_causal)
    return {"window_size": tuple(window.values())} if _takes_pair(run) else window


@cache
def _takes_pair(run: Any) -> bool:
    """Asked of a function once, not in every layer's call."""
    return "window_size" in inspect.signature(run).parameters


def _package_borders(documents: Documents, query: Tensor, key: Tensor) -> dict[str, Any]:
    if documents.are_rows:
        return {}
    names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    return dict(zip(names, _borders(documents, query, key), strict=True))


def _package_arguments(spec: AttentionSpec, is_causal: bool) -> dict[str, Any]:
    return {
        "dropout_p": spec.dropout,
        "softmax_scale": spec.scaling,
        "causal": is_causal,
        **_window(spec, is_causal),
        "softcap": spec.softcap or 0.0,
        "alibi_slopes": None,
    }
