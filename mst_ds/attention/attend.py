"""Causal attention on one device: the one way in, whatever kernel there is. No path builds an S x S mask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.attention
from torch import Tensor

from mst_ds.flash_attn_package import flash_attn_2_version

from .choice import choose_indexed_kernel, choose_kernel
from .chunk import AddGradients, EarlierKeys, KeyBlock, join_keys
from .documents import Documents
from .hub_kernels import HUB_KERNELS, hub_flash_attention
from .kernel import Attended, Kernel
from .merging import merge_sinks, sinks_gradient
from .spec import AttentionSpec
from .widths import common_width, widened

# The names of transformers, and those of torch.
_ACTIVATED_BY_TORCH = {"flash_attention_3": "FA3", "flash_attention_4": "FA4"}


@dataclass(frozen=True)
class CausalAttention:
    """Causal attention that never crosses a document, for one forward of a model and its backward.

    Args:
        name: of the setting "attention": see `prepare_attention`.
        documents: of the batch; found once per forward, not once per layer.
        picks: (B, S, k) of a layer whose queries see picked keys alone, see `Indexed`; None where they see all.
    """

    name: str
    documents: Documents = field(default_factory=Documents)
    picks: Tensor | None = field(default=None, repr=False, compare=False)
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
        width = common_width(query, value)
        wide = [widened(tensor, width) for tensor in (query, key, value)]
        spec = spec.within(key.shape[2])
        kernel = self._kernel(wide[0], spec)
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
        width = common_width(query, value)
        wide = [widened(tensor, width) for tensor in (grad_output, query, key, value)]
        whole = replace(attended, output=widened(attended.output, width))
        spec = spec.within(key.shape[2])
        kernel = self._kernel(wide[1], spec)
        found = kernel.backward(wide[0], wide[1], wide[2], wide[3], whole, spec, self.documents)
        grads = [grad[..., : like.shape[3]] for grad, like in zip(found, (query, key, value), strict=True)]
        return grads if sinks is None else [*grads, sinks_gradient(grad_output, attended, sinks)]

    def earlier_keys(self, tokens: slice, spec: AttentionSpec) -> slice:
        """The tokens before a chunk that a query of it sees in some row; an empty slice at its start if there are none.

        Args:
            tokens: of the chunk, positions in the sequence whose documents `documents` has.
        """
        first = self.documents.first_continued(tokens)
        if spec.window is not None:
            first = min(tokens.start, max(first, tokens.start - spec.window + 1))
        return slice(first, tokens.start)

    def forward_chunk(
        self,
        tokens: slice,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        earlier: Iterable[KeyBlock],
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Attended:
        """Attention of a chunk of a sequence to itself and to what it sees of the earlier tokens.

        Args:
            tokens: of the chunk, positions in the sequence whose documents `documents` has.
            query: (B, n, c, D); key: (B, k, c, D); value: (B, k, c, Dv), of the chunk.
            earlier: the keys and values of earlier tokens, in any order, without overlaps: those of `earlier_keys` at
                least. A block is let go before the next is asked for.
            sinks: see `forward`.

        Returns:
            Its output is (B, n, c, Dv).
        """
        needed, own = self.earlier_keys(tokens, spec), self._within(tokens)
        if needed.start == needed.stop:
            return own.forward(query, key, value, spec, sinks)
        if self._has_window(tokens, spec):
            key, value = join_keys(needed, earlier, key, value)
            return self._within(slice(needed.start, tokens.stop)).forward(query, key, value, spec, sinks)
        spec = replace(spec, window=None)
        attended = own.forward(query, key, value, spec)
        # Rounded once, when all is merged.
        attended = replace(attended, output=attended.output.to(attended.log_sum_exp.dtype))
        attended = self._earlier(tokens, spec).merge(attended, query, key.shape[1], earlier)
        if sinks is not None:
            attended = merge_sinks(attended, sinks)
        return replace(attended, output=attended.output.to(query.dtype))

    def backward_chunk(
        self,
        tokens: slice,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        earlier: Iterable[KeyBlock],
        attended: Attended,
        spec: AttentionSpec,
        sinks: Tensor | None,
        add: AddGradients,
    ) -> list[Tensor]:
        """The gradients of the chunk's query, key and value, and of sinks; that of the sinks in fp32 at least.

        Args:
            grad_output: (B, n, c, Dv).
            earlier: the blocks that `forward_chunk` got, in the same order; without dropout others will do.
            attended: what `forward_chunk` gave.
            add: called with positions of T earlier tokens and the gradients of their keys, (B, k, T, D), and values,
                (B, k, T, Dv), in their dtype. Those of a token that comes several times are to be summed; of one that
                never comes they are 0.
        """
        needed, own = self.earlier_keys(tokens, spec), self._within(tokens)
        if needed.start == needed.stop:
            return own.backward(grad_output, query, key, value, attended, spec, sinks)
        if self._has_window(tokens, spec):
            key, value = join_keys(needed, earlier, key, value)
            both = self._within(slice(needed.start, tokens.stop))
            of_query, of_key, of_value, *of_sinks = both.backward(grad_output, query, key, value, attended, spec, sinks)
            before = needed.stop - needed.start
            add(needed, of_key[:, :, :before], of_value[:, :, :before])
            return [of_query, of_key[:, :, before:], of_value[:, :, before:], *of_sinks]
        spec, attended = replace(spec, window=None), replace(attended, draws=iter(attended.draws))
        of_query, *others = own.backward(grad_output, query, key, value, attended, spec, sinks)
        of_query = of_query.to(attended.log_sum_exp.dtype)
        of_blocks = self._earlier(tokens, spec)
        of_blocks.add_gradients(of_query, grad_output, query, key.shape[1], attended, earlier, add)
        return [of_query.to(query.dtype), *others]

    def _kernel(self, query: Tensor, spec: AttentionSpec) -> Kernel:
        if self.picks is None:
            return choose_kernel(self.name, query, spec, self.documents, self._masks)
        return choose_indexed_kernel(self.name, query, spec, self.documents, self._masks, self.picks)

    def _within(self, tokens: slice) -> CausalAttention:
        return replace(self, documents=self.documents.within(tokens))

    def _has_window(self, tokens: slice, spec: AttentionSpec) -> bool:
        """Whether the window hides something of a chunk and the documents that go on into it."""
        return spec.window is not None and spec.window < tokens.stop - self.documents.first_continued(tokens)

    def _earlier(self, tokens: slice, spec: AttentionSpec) -> EarlierKeys:
        return EarlierKeys(self.name, self.documents, tokens, spec)


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
