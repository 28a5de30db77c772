"""What a kernel of attention gives and takes: its output and log-sum-exp are explicit, so that results can be merged.

Kernels stand in three tiers. A `Kernel` takes packed documents; flash attention on CUDA is one. Where there is none,
`PerDocument` makes one of a `DocumentKernel`, which takes a window. Where there is none, `OverBlocks` makes one of a
`BlockKernel`, which takes a mask at most.

Everywhere in this room: query (B, n, S, D); key and value (B, k, T, D) with k dividing n. The queries are the last S of
the T tokens, so that query i stands at position T - S + i. A kernel that is made not to be causal is for a block of
earlier keys: all queries see all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .documents import Documents
from .spec import AttentionSpec

# What one call of a kernel drew at random, such as a seed and an offset; nothing without dropout on the CPU.
Draw = tuple[Tensor, ...]
# Of query, key and value.
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Attended:
    """What attention gives, and what its backward needs beside its inputs.

    Args:
        output: (B, n, S, D) in any layout.
        log_sum_exp: (B, n, S), the natural logarithm of the softmax's denominator, in fp32 at least.
        draws: of each call of a kernel, in the order of the calls. A backward takes them in this order.
    """

    output: Tensor
    log_sum_exp: Tensor
    draws: Iterable[Draw] = ()


class Kernel(Protocol):
    """Causal attention that never crosses a document, in memory linear in S."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, documents: Documents
    ) -> Attended: ...

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
        """The gradients of these keys' part of a softmax with that log-sum-exp: further keys may be in it, whose values
        are then in `attended.output` too."""
        ...


class DocumentKernel(Protocol):
    """A `Kernel` of one document, or of one in each row."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Attended: ...

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, spec: AttentionSpec
    ) -> Gradients: ...


@dataclass(frozen=True)
class Block:
    """Which keys of a block its queries see, and how they weigh them.

    Args:
        is_causal: query i sees the keys up to i; there are as many keys as queries.
        mask: (queries, keys), added to the scores; None where all are seen, or `is_causal` says which.
    """

    scaling: float
    dropout: float
    is_causal: bool = False
    mask: Tensor | None = None


class BlockKernel(Protocol):
    """Attention of queries (B, n, S, D) to keys and values (B, k, T, D), all of which they see but for `block`."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, block: Block) -> Attended: ...

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, block: Block
    ) -> Gradients: ...
