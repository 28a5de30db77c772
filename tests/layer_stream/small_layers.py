"""Layers without attention, and what they compute without a stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

HIDDEN = 16


class Mlp(nn.Module):
    """A gated MLP with a norm, dropout, a residual and a scale."""

    def __init__(self, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = nn.Linear(HIDDEN, 40), nn.Linear(HIDDEN, 40, bias=False)
        self.norm = nn.LayerNorm(40)
        self.down = nn.Linear(40, HIDDEN)
        self.scale = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.dropout = nn.Dropout(dropout)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.dropout(silu(self.gate(x)) * self.up(x))
        return x + self.scale * self.down(self.norm(inner))
