"""Attention over packed documents: each is attended to by itself, and keeps its own part of the autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mst_ds.dtypes import sum_dtype
from mst_ds.recompute import Kept, KeptGraph

from .kernels import CausalAttention
from .spec import AttentionSpec

DocumentStarts = list[list[int]]


@dataclass(frozen=True)
class DocumentAttention:
    """Causal attention that never crosses a document, in memory linear in S.

    Args:
        attend: attention over one document.
        spec: what it computes; its sinks are given with each call.
        document_starts: for each row of the batch the first position of each of its documents, 0 first; None when
            every row is one document, a list of one for all rows alike.
    """

    attend: CausalAttention
    spec: AttentionSpec
    document_starts: DocumentStarts | None

    def forward(self, tensors: Sequence[Tensor], output: Tensor) -> None:
        """Write the attention of query (B, n, S, D), key (B, k, S, D), value (B, k, S, Dv) and, if there are any,
        sinks (n,) to `output`, (B, n, S, Dv) in any layout."""
        for rows, positions in self._documents(output):
            document = self._attend_document(*_inputs(tensors, rows, positions))
            output[rows, :, positions] = document[..., : output.shape[3]]

    def forward_with_graphs(
        self, tensors: Sequence[Tensor], output: Tensor, keep: Callable[[Tensor], Kept]
    ) -> list[KeptGraph]:
        """`forward`, with what `backward` needs beside the same tensors."""
        graphs = []
        for rows, positions in self._documents(output):
            graph = KeptGraph(self._attend_document, _inputs(tensors, rows, positions), keep)
            output[rows, :, positions] = graph.take_output()[..., : output.shape[3]]
            graphs.append(graph)
        return graphs

    def backward(
        self, graphs: Sequence[KeptGraph], tensors: Sequence[Tensor], output: Tensor, grad_output: Tensor
    ) -> list[Tensor]:
        """The gradient of each of `tensors`, that of the sinks in fp32 at least."""
        documents = list(self._documents(output))
        results: list[Tensor] = []
        for graph, (rows, positions) in zip(graphs, documents, strict=True):
            inputs = _inputs(tensors, rows, positions)
            width = inputs[0].shape[3]
            of_output = (_widened(tensor[rows, :, positions], width) for tensor in (output, grad_output))
            grads = [
                grad[..., : tensor.shape[3]] if tensor.dim() == 4 else grad.to(sum_dtype(grad.dtype))
                for grad, tensor in zip(graph.backward(inputs, *of_output), tensors, strict=True)
                if grad is not None
            ]
            if len(documents) == 1:
                return grads
            if not results:
                results = [
                    torch.empty_like(tensor) if tensor.dim() == 4 else torch.zeros_like(grad)
                    for tensor, grad in zip(tensors, grads, strict=True)
                ]
            for result, grad in zip(results, grads, strict=True):
                if result.dim() == 4:
                    result[rows, :, positions] = grad
                else:
                    result.add_(grad)
        return results

    def _documents(self, output: Tensor) -> list[tuple[slice, slice]]:
        """Rows and positions of each document; rows that are one document are attended to together."""
        batch, _, length, _ = output.shape
        if self.document_starts is None:
            return [(slice(0, batch), slice(0, length))]
        starts = self.document_starts * batch if len(self.document_starts) == 1 else self.document_starts
        return [
            (slice(row, row + 1), slice(start, stop))
            for row, of_row in enumerate(starts)
            for start, stop in zip(of_row, [*of_row[1:], length], strict=True)
        ]

    def _attend_document(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        window = self.spec.window
        if window is not None and window >= query.shape[2]:
            window = None
        return self.attend(query, key, value, replace(self.spec, window=window, sinks=sinks))


def _inputs(tensors: Sequence[Tensor], rows: slice, positions: slice) -> list[Tensor]:
    """One document's part of the tensors. Kernels without an S x S matrix want heads of one width."""
    width = max(tensor.shape[3] for tensor in tensors[:3])
    parts = [_widened(tensor[rows, :, positions], width) for tensor in tensors[:3]]
    return [*parts, *tensors[3:]]


def _widened(tensor: Tensor, width: int) -> Tensor:
    return pad(tensor, (0, width - tensor.shape[3])) if tensor.shape[3] < width else tensor
