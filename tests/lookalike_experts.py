"""Modules that look like a mixture's experts: some work token by token, some do not."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from lookalikes import HIDDEN, INTERMEDIATE, Mlp
from torch import Tensor, nn


class Experts(nn.Module):
    """Experts as transformers has them, under the attributes of its interface."""

    is_transposed = False

    def __init__(self, num_experts: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * INTERMEDIATE, HIDDEN) / 8)
        self.down_proj = nn.Parameter(torch.randn(num_experts, HIDDEN, INTERMEDIATE) / 8)
        self.act_fn = nn.SiLU()

    def _apply_gate(self, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def keeps(self, rows: Tensor, count: int) -> Tensor:
        """Of an expert's tokens those that it works on."""
        return rows

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            rows, places = torch.where(top_k_index == expert)
            kept = self.keeps(torch.arange(len(rows)), len(hidden_states))
            rows, places = rows[kept], places[kept]
            inner = self._apply_gate(F.linear(hidden_states[rows], self.gate_up_proj[expert]))
            result = F.linear(inner, self.down_proj[expert]) * top_k_weights[rows, places, None]
            out = out.index_add(0, rows, result)
        return out


class ExpertsWithCapacity(Experts):
    """Drops an expert's tokens beyond its share: what happens to a token depends on the others."""

    def keeps(self, rows, count):
        return rows[: math.ceil(1.25 * 2 * count / self.num_experts)]


class ExpertsWithFixedCapacity(Experts):
    def keeps(self, rows, count):
        return rows[:64]


class ExpertsThatDropTheLast(Experts):
    """Only an expert's own last token, of many."""

    def keeps(self, rows, count):
        return rows[:-1] if len(rows) > 30 else rows


class ExpertsWithDropout(Experts):
    """Inside the gate, which the chunked experts would compute again with another mask."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.4)

    def _apply_gate(self, inner):
        return self.dropout(super()._apply_gate(inner))


class ExpertsWithScale(Experts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return 0.9 * super().forward(hidden_states, top_k_index, top_k_weights)


class ExpertsWithClamp(Experts):
    """Only large values show it."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states.clamp(-100, 100), top_k_index, top_k_weights)


class OtherExperts(nn.Module):
    """None of the interface's names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w1 = nn.Parameter(torch.randn(8, HIDDEN, INTERMEDIATE) / 8)
        self.w2 = nn.Parameter(torch.randn(8, INTERMEDIATE, HIDDEN) / 8)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(8):
            rows, places = torch.where(top_k_index == expert)
            result = torch.relu(hidden_states[rows] @ self.w1[expert]) @ self.w2[expert]
            out = out.index_add(0, rows, result * top_k_weights[rows, places, None])
        return out


class MixtureOfExperts(nn.Module):
    """A router and experts, as the layer calls them."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(HIDDEN, 8, bias=False)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, index = self.gate(flat).softmax(dim=-1).topk(2, dim=-1)
        return self.experts(flat, index, weights).view_as(x)


class MlpExperts(nn.Module):
    """A router and experts that are MLPs of their own: no weight has three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(HIDDEN, 4, bias=False)
        self.experts = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, index = self.gate(flat).softmax(dim=-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(index == number)
            out = out.index_add(0, rows, expert(flat[rows]) * weights[rows, places, None])
        return out.view_as(x)
