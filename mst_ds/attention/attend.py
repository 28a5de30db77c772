"""Causal attention on one device: the one way in, whatever kernel there is. No path builds an S x S mask."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.attention
from torch import Tensor
from torch.nn.functional import pad

from mst_ds.flash_attn_package import flash_attn_2_version
from mst_ds.geometry import ceil_divide

from .choice import choose_kernel
from .documents import Documents
from .hub_kernels import HUB_KERNELS, hub_flash_attention
from .kernel import Attended
from .merging import merge_sinks, sinks_gradient
from .spec import AttentionSpec

# The names of transformers, and those of torch.
_ACTIVATED_BY_TORCH = {"flash_attention_3": "FA3", "flash_attention_4": "FA4"}
# Kernels on CUDA want heads of one width, a multiple of this.
_WIDTH = 8


@dataclass(frozen=True)
class CausalAttention:
    """Causal attention that never crosses a document, for one forward of a model and its backward.

    Args:
        name: of the setting "attention": see `prepare_attention`.
        documents: of the batch; found once per forward, not once per layer.
    """

    name: str
    documents: Documents = field(default_factory=Documents)
    _masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, sinks: Tensor | None = None
    ) -> Attended:
        """Attention from the last S of T tokens to all of them, in memory linear in S.

        Args:
            query: (B, n, S, D); key: (B, k, T, D); value: (B, k, T, Dv), with k dividing n.
            sinks: (n,) for each query head a further logit in the softmax's denominator (GPT-OSS, arXiv 2508.10925).

        Returns:
            Its output is (B, n, S, Dv).
        """
        width = _common_width(query, value)
        wide = [_widened(tensor, width) for tensor in (query, key, value)]
        spec = _without_idle_window(spec, key)
        kernel = choose_kernel(self.name, wide[0], spec, self.documents, self._masks)
        attended = kernel.forward(wide[0], wide[1], wide[2], spec, self.documents)
        if sinks is not None:
            attended = merge_sinks(attended, sinks)
        return replace(attended, output=attended.output[..., : value.shape[3]])

    def backward(
        self,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attended: Attended,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> list[Tensor]:
        """The gradients of query, key, value and sinks; that of the sinks in fp32 at least.

        Args:
            grad_output: (B, n, S, Dv).
            attended: what `forward` gave.
        """
        width = _common_width(query, value)
        wide = [_widened(tensor, width) for tensor in (grad_output, query, key, value)]
        whole = replace(attended, output=_widened(attended.output, width))
        spec = _without_idle_window(spec, key)
        kernel = choose_kernel(self.name, wide[1], spec, self.documents, self._masks)
        found = kernel.backward(wide[0], wide[1], wide[2], wide[3], whole, spec, self.documents)
        grads = [grad[..., : like.shape[3]] for grad, like in zip(found, (query, key, value), strict=True)]
        return grads if sinks is None else [*grads, sinks_gradient(grad_output, attended, sinks)]


def prepare_attention(name: str) -> None:
    """Make the kernels ready that the setting "attention" names: "sdpa", torch's own, the fastest it has for a device;
    "flash_attention_2", the package flash-attn; "flash_attention_3" and "flash_attention_4", which torch puts in the
    place of its own flash attention, in the whole process; a repository of the hub, which is downloaded.

    Raises:
        ValueError: an unknown name, flash attention without its package, or a repository that cannot be loaded.
    """
    if name == "flash_attention_2":
        if flash_attn_2_version() is None:
            raise ValueError(
                'attention "flash_attention_2" needs the package flash-attn, version 2: install it, or use "sdpa"'
            )
    elif name in _ACTIVATED_BY_TORCH:
        _activate(name)
    elif name in HUB_KERNELS:
        hub_flash_attention(name)
    elif name != "sdpa":
        known = ", ".join(["sdpa", "flash_attention_2", *_ACTIVATED_BY_TORCH, *HUB_KERNELS])
        raise ValueError(f"attention must be one of {known}; got {name!r}")


def _activate(name: str) -> None:
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None:
        raise ValueError(f'attention "{name}" needs torch 2.11 or newer, not {torch.__version__}: use "sdpa"')
    try:
        activate(_ACTIVATED_BY_TORCH[name])
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f'attention "{name}" needs the package flash-attn {name[-1]}, which torch does not find ({error}): '
            'install it, or use "sdpa"'
        ) from None


def _without_idle_window(spec: AttentionSpec, key: Tensor) -> AttentionSpec:
    """A window that is as long as all that is there hides nothing."""
    return replace(spec, window=None) if spec.window is not None and spec.window >= key.shape[2] else spec


def _common_width(query: Tensor, value: Tensor) -> int:
    width = max(query.shape[3], value.shape[3])
    return ceil_divide(width, _WIDTH) * _WIDTH if query.is_cuda else width


def _widened(tensor: Tensor, width: int) -> Tensor:
    if tensor.shape[3] < width:
        return pad(tensor, (0, width - tensor.shape[3]))
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()
