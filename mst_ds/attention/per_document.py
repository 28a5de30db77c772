"""Packed documents over a kernel that attends to one document at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .documents import Documents
from .kernel import Attended, DocumentKernel, Draw, Gradients
from .spec import AttentionSpec


@dataclass(frozen=True)
class PerDocument:
    """A `Kernel` that calls another for each document."""

    kernel: DocumentKernel

    def forward(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, documents: Documents) -> Attended:
        if documents.are_rows:
            return self.kernel.forward(query, key, value, spec)
        batch, heads, length, width = query.shape
        # A token's heads lie beside each other, as the output projection takes them.
        output = query.new_empty(batch, length, heads, width).transpose(1, 2)
        log_sum_exp: Tensor | None = None
        draws: list[Draw] = []
        for rows, queries, keys in documents.parts(batch, length, key.shape[2]):
            parts = query[rows, :, queries], key[rows, :, keys], value[rows, :, keys]
            attended = self.kernel.forward(*parts, spec)
            if log_sum_exp is None:
                log_sum_exp = attended.log_sum_exp.new_empty(batch, heads, length)
            output[rows, :, queries] = attended.output
            log_sum_exp[rows, :, queries] = attended.log_sum_exp
            draws.extend(attended.draws)
        assert log_sum_exp is not None
        return Attended(output, log_sum_exp, draws)

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
        if documents.are_rows:
            return self.kernel.backward(grad_output, query, key, value, attended, spec)
        # Keys without queries have gradients of 0.
        empty = torch.empty_like if query.shape[2] == key.shape[2] else torch.zeros_like
        grads = torch.empty_like(query), empty(key), empty(value)
        draws = iter(attended.draws)
        for rows, queries, keys in documents.parts(query.shape[0], query.shape[2], key.shape[2]):
            place_of_query, place_of_key = (rows, slice(None), queries), (rows, slice(None), keys)
            part = Attended(attended.output[place_of_query], attended.log_sum_exp[place_of_query], draws)
            given = query[place_of_query], key[place_of_key], value[place_of_key]
            found = self.kernel.backward(grad_output[place_of_query], *given, part, spec)
            places = place_of_query, place_of_key, place_of_key
            for grad, place, of_document in zip(grads, places, found, strict=True):
                grad[place] = of_document
        return grads
