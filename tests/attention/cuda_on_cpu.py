"""Kernels that need a GPU, as their documentation has them, in dense arithmetic on the CPU: what they are handed and
what is made of their results is tested with real numbers, the kernels themselves are not."""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mst_ds.attention.hub_kernels import hub_flash_attention


def visible(queries: int, keys: int, left: int, right: int) -> Tensor:
    """(queries, keys), the last query standing at the last key; -1 for no border on that side."""
    position = torch.arange(keys - queries, keys)[:, None]
    key = torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        seen &= key >= position - left
    if right >= 0:
        seen &= key <= position + right
    return seen


def scores_of(query: Tensor, key: Tensor, scaling: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """(B, n, S, T), and the derivative of the softcap."""
    scores = query @ key.transpose(2, 3) * scaling
    if not softcap:
        return scores, 1.0
    capped = torch.tanh(scores / softcap)
    return capped * softcap, 1 - capped.square()


def dense_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of (B, n, S, D) heads; fewer key/value heads go round."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = scores_of(query, key, scaling, softcap)[0] + bias
    log_sum_exp = scores.logsumexp(dim=3)
    return (scores - log_sum_exp[..., None]).exp() @ value, log_sum_exp


def dense_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    bias: Tensor,
    scaling: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As flash attention's (arXiv 2307.08691, algorithm 2): weights are made of the log-sum-exp that is given."""
    kv_heads = key.shape[1]
    key, value = (x.repeat_interleave(query.shape[1] // kv_heads, dim=1) for x in (key, value))
    scores, slope = scores_of(query, key, scaling, softcap)
    weights = (scores + bias - log_sum_exp[..., None]).exp()
    of_scores = weights * (grad @ value.transpose(2, 3) - (grad * output).sum(dim=3, keepdim=True)) * slope * scaling
    of_key, of_value = of_scores.transpose(2, 3) @ query, weights.transpose(2, 3) @ grad
    grouped = (x.unflatten(1, (kv_heads, -1)).sum(dim=2) for x in (of_key, of_value))
    return of_scores @ key, *grouped


def bias_of(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))


class CudaOnCpu:
    """calls: how often each kernel ran."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._drawn: list[tuple[torch.Size, ...]] = []

    def draw(self, *given: Tensor) -> Tensor:
        """What stands for a seed: which call of a forward it was."""
        self._drawn.append(tuple(x.shape for x in given))
        return torch.tensor(len(self._drawn) - 1)

    def use(self, seed: Tensor, *given: Tensor) -> None:
        """A backward draws what its own forward drew."""
        assert self._drawn[seed.item()] == tuple(x.shape for x in given)

    def flash_forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, most: tuple[int, int], **asked: Any
    ) -> tuple[Tensor, Tensor]:
        """(B, S, n, D), or (tokens, n, D) of documents with their borders."""
        self.calls["flash forward"] += 1
        if cu_q is None:
            assert most == (q.shape[1], k.shape[1])
            output, log_sum_exp = dense_forward(*(x.transpose(1, 2) for x in (q, k, v)), **self._flash(most, asked))
            return output.transpose(1, 2), log_sum_exp
        output, log_sum_exp = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
        for rows, keys in self._documents(cu_q, cu_k, most):
            given = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
            lengths = rows.stop - rows.start, keys.stop - keys.start
            of_document, sums = dense_forward(*given, **self._flash(lengths, asked))
            output[rows], log_sum_exp[:, rows] = of_document[0].transpose(0, 1), sums[0]
        return output, log_sum_exp

    def flash_backward(
        self,
        g: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        cu_q: Any,
        cu_k: Any,
        most: Any,
        **asked: Any,
    ) -> tuple[Tensor, ...]:
        self.calls["flash backward"] += 1
        assert lse.is_contiguous()
        if cu_q is None:
            g, q, k, v, o = (x.transpose(1, 2) for x in (g, q, k, v, o))
            found = dense_backward(g, q, k, v, o, lse, **self._flash(most, asked))
            return tuple(x.transpose(1, 2) for x in found)
        grads = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys in self._documents(cu_q, cu_k, most):
            given = [x.transpose(0, 1)[None] for x in (g[rows], q[rows], k[keys], v[keys], o[rows])]
            lengths = rows.stop - rows.start, keys.stop - keys.start
            found = dense_backward(*given, lse[None, :, rows], **self._flash(lengths, asked))
            for grad, place, part in zip(grads, (rows, keys, keys), found, strict=True):
                grad[place] = part[0].transpose(0, 1)
        return grads

    @staticmethod
    def _documents(cu_q: Tensor, cu_k: Tensor, most: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
        assert cu_q.dtype == cu_k.dtype == torch.int32
        of_queries, of_keys = ([slice(*pair) for pair in pairwise(x.tolist())] for x in (cu_q, cu_k))
        assert most == tuple(max(part.stop - part.start for part in parts) for parts in (of_queries, of_keys))
        return zip(of_queries, of_keys, strict=True)

    @staticmethod
    def _flash(lengths: tuple[int, int], asked: dict[str, Any]) -> dict[str, Any]:
        left = -1 if asked["left"] is None else asked["left"]
        right = asked["right"]
        assert right == (0 if asked["causal"] else -1)
        assert asked["causal"] or left == -1
        seen = visible(*lengths, left, right)
        return {"bias": bias_of(seen), "scaling": asked["scale"], "softcap": asked.get("softcap", 0.0)}

    # torch's operators, by their schemas.

    def _flash_attention_forward(
        self, q, k, v, cu_q, cu_k, most_q, most_k, dropout, causal, debug, *, scale, window_size_left, window_size_right
    ):
        assert (dropout, debug) == (0.0, False)
        asked = {"causal": causal, "scale": scale, "left": window_size_left, "right": window_size_right}
        found = self.flash_forward(q, k, v, cu_q, cu_k, (most_q, most_k), **asked)
        return *found, self.draw(q, k), torch.tensor(4), torch.empty(0)

    def _flash_attention_backward(
        self, g, q, k, v, o, lse, cu_q, cu_k, most_q, most_k, dropout, causal, rng, unused, *, scale,
        window_size_left, window_size_right,
    ):  # fmt: skip
        self.use(rng, q, k)
        assert unused.item() == 4
        asked = {"causal": causal, "scale": scale, "left": window_size_left, "right": window_size_right}
        return self.flash_backward(g, q, k, v, o, lse, cu_q, cu_k, (most_q, most_k), **asked)

    def _scaled_dot_product_cudnn_attention(
        self, q, k, v, bias, with_sums, dropout=0.0, causal=False, debug=False, *, scale
    ):
        assert (bias, with_sums, debug) == (None, True, False)
        self.calls["cudnn forward"] += 1
        seen = visible(q.shape[2], k.shape[2], -1, 0 if causal else -1)
        output, log_sum_exp = dense_forward(q, k, v, bias_of(seen), scale)
        seed = self.draw(q, k), torch.tensor(4)
        return output, log_sum_exp[..., None], None, None, q.shape[2], k.shape[2], *seed, None

    def _scaled_dot_product_cudnn_attention_backward(
        self, g, q, k, v, o, lse, seed, offset, bias, cu_q, cu_k, most_q, most_k, dropout, causal, *, scale
    ):
        self.calls["cudnn backward"] += 1
        self.use(seed, q, k)
        assert (offset.item(), most_q, most_k) == (4, q.shape[2], k.shape[2])
        assert lse.shape == (*q.shape[:3], 1)
        seen = visible(q.shape[2], k.shape[2], -1, 0 if causal else -1)
        return dense_backward(g, q, k, v, o, lse[..., 0], bias_of(seen), scale)

    def _scaled_dot_product_efficient_attention(self, q, k, v, bias, with_sums, dropout=0.0, causal=False, *, scale):
        assert with_sums
        self.calls["efficient forward"] += 1
        output, log_sum_exp = dense_forward(q, k, v, self._efficient_bias(q, k, v, bias, causal), scale)
        padded = torch.nn.functional.pad(log_sum_exp, (0, -q.shape[2] % 32), value=float("nan"))
        return output, padded, self.draw(q, k), torch.tensor(4)

    def _scaled_dot_product_efficient_attention_backward(
        self, g, q, k, v, bias, o, lse, seed, offset, dropout, wanted, causal=False, *, scale
    ):
        self.calls["efficient backward"] += 1
        self.use(seed, q, k)
        assert (offset.item(), list(wanted)) == (4, [True, True, True, False])
        assert lse.is_contiguous()
        assert lse.shape[2] % 32 == 0
        assert lse.isfinite().all()
        lse = lse[..., : q.shape[2]]
        return *dense_backward(g, q, k, v, o, lse, self._efficient_bias(q, k, v, bias, causal), scale), None

    @staticmethod
    def _efficient_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        assert q.shape[1] == k.shape[1] == v.shape[1]
        if bias is None:
            return bias_of(visible(q.shape[2], k.shape[2], -1, 0 if causal else -1))
        assert not causal
        assert bias.shape == (*q.shape[:3], k.shape[2])
        assert bias.stride(2) % 16 == 0
        return bias


_OPERATORS = [name for name in vars(CudaOnCpu) if name.startswith(("_flash_attention_", "_scaled_dot_product_"))]


@contextmanager
def cuda_on_cpu() -> Iterator[CudaOnCpu]:
    """Within, torch's kernels for CUDA run on tensors of the CPU, without dropout."""
    kernels, library = CudaOnCpu(), torch.library.Library("aten", "IMPL")
    try:
        for name in _OPERATORS:
            library.impl(name, getattr(kernels, name), "CPU")
        yield kernels
    finally:
        library._destroy()


def _flash_2_interface(kernels: CudaOnCpu) -> types.SimpleNamespace:
    """The functions of `flash_attn_interface` in version 2.7."""

    def named(asked: dict[str, Any]) -> dict[str, Any]:
        assert (asked["dropout_p"], asked["alibi_slopes"]) == (0.0, None)
        window = {"left": asked["window_size_left"], "right": asked["window_size_right"]}
        return {"causal": asked["causal"], "scale": asked["softmax_scale"], "softcap": asked["softcap"], **window}

    def forward(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0, **asked):
        assert asked["return_softmax"] is False
        most = (q.shape[1], k.shape[1]) if cu_seqlens_q is None else (max_seqlen_q, max_seqlen_k)
        found = kernels.flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, most, **named(asked))
        return *found, None, kernels.draw(q, k)

    def backward(
        g, q, k, v, o, lse, dq, dk, dv, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0, **asked
    ):
        kernels.use(asked["rng_state"], q, k)
        most = (q.shape[1], k.shape[1]) if cu_seqlens_q is None else (max_seqlen_q, max_seqlen_k)
        found = kernels.flash_backward(g, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, most, **named(asked))
        for target, grad in zip((dq, dk, dv), found, strict=True):
            target.copy_(grad)

    return types.SimpleNamespace(
        _flash_attn_forward=forward,
        _flash_attn_varlen_forward=forward,
        _flash_attn_backward=backward,
        _flash_attn_varlen_backward=backward,
    )


def _flash_3_interface(kernels: CudaOnCpu) -> types.SimpleNamespace:
    """The functions of kernels-community/flash-attn3, arguments in their order."""

    def asked(q, k, most_q, most_k, causal, scale, left, right, softcap):
        most = (q.shape[1], k.shape[1]) if most_q is None else (most_q, most_k)
        return {"most": most, "causal": causal, "scale": scale, "left": left, "right": right, "softcap": softcap}

    def forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0,
    ):  # fmt: skip
        unused = (k_new, v_new, qv, out_, cu_seqlens_k_new, seqused_q, seqused_k, page_table, kv_batch_idx, leftpad_k)
        unused += (rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale)
        assert {*unused, attention_chunk} == {None, 0}
        window = window_size_left, window_size_right
        given = asked(q, k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, *window, softcap)
        return *kernels.flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, **given), None, None

    def backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False,
    ):  # fmt: skip
        assert (sequed_q, sequed_k, deterministic) == (None, None, False)
        window = window_size_left, window_size_right
        given = asked(q, k, max_seqlen_q, max_seqlen_k, is_causal, softmax_scale, *window, softcap)
        found = kernels.flash_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, **given)
        for target, grad in zip((dq, dk, dv), found, strict=True):
            target.copy_(grad)

    return types.SimpleNamespace(_flash_attn_forward=forward, _flash_attn_backward=backward)


def _vllm_flash_3_interface(kernels: CudaOnCpu) -> types.SimpleNamespace:
    """The functions of kernels-community/vllm-flash-attn3: as many arguments have to be given, a window is a pair."""
    flash_3 = _flash_3_interface(kernels)

    def forward(*given, window_size=(-1, -1), softcap=0.0):
        assert len(given) == 25
        return flash_3._flash_attn_forward(*given, *window_size, softcap=softcap)

    def backward(*given, window_size=(-1, -1), softcap=0.0, deterministic=False):
        assert len(given) == 17
        flash_3._flash_attn_backward(*given, *window_size, softcap, deterministic)

    return types.SimpleNamespace(_flash_attn_forward=forward, _flash_attn_backward=backward)


@contextmanager
def _module_in_place(name: str, **attributes: Any) -> Iterator[None]:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before


@contextmanager
def flash_package_on_cpu() -> Iterator[CudaOnCpu]:
    """Within, `flash_attn.flash_attn_interface` is there."""
    kernels = CudaOnCpu()
    with _module_in_place("flash_attn", flash_attn_interface=_flash_2_interface(kernels)):
        yield kernels


@contextmanager
def hub_on_cpu() -> Iterator[CudaOnCpu]:
    """Within, the library `kernels` is there, and gives what the hub has."""
    kernels = CudaOnCpu()
    hub = {
        ("kernels-community/flash-attn2", 4 if torch.__version__ >= (2, 10) else 3): _flash_2_interface(kernels),
        ("kernels-community/flash-attn3", 1): _flash_3_interface(kernels),
        ("kernels-community/vllm-flash-attn3", 1): _vllm_flash_3_interface(kernels),
    }

    def get_kernel(repo_id: str, *, version: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(flash_attn_interface=hub[repo_id, version])

    with _module_in_place("kernels", get_kernel=get_kernel):
        hub_flash_attention.cache_clear()
        yield kernels
    hub_flash_attention.cache_clear()
