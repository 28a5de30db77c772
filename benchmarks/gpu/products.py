"""Probes of matrix products: 16-bit factors, a sum in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.sections import Context, attempt
from benchmarks.gpu.timing import seconds_of
from mst_ds.minisequence.chunks import GradientSum

_CHECKED_ROWS = 64  # against fp64


def _forms(of_operators: GradientSum, left: Tensor, right: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to add left.T @ right, (T, M) and (T, N), to a sum, (M, N), and the product in 16 bits that none can be
    faster than."""
    fp32, total = torch.float32, of_operators.total
    assert total is not None
    return {
        "addmm(out_dtype, out)": lambda: torch.addmm(total, left.t(), right, out_dtype=fp32, out=total),
        "add mm(out_dtype)": lambda: total.add_(torch.mm(left.t(), right, out_dtype=fp32)),
        "fp32 copies": lambda: total.addmm_(left.to(fp32).t(), right.to(fp32)),
        "mst_ds": lambda: of_operators.add_outer_products(left, right),
        "16-bit product": lambda: total.copy_(torch.mm(left.t(), right)),
    }


def probe_products(context: Context) -> list[dict[str, Any]]:
    """For each number of tokens and form: the error against fp64, about 1e-7 where sums are in fp32 and 1e-3 where
    they are rounded; seconds; TFLOP/s; or why it does not run."""
    rows, columns = context.scale.product
    found = []
    for tokens in context.scale.product_tokens:
        with context.device:
            torch.manual_seed(0)
            left, right = (torch.randn(tokens, width, dtype=torch.bfloat16) for width in (rows, columns))
            of_operators = GradientSum(torch.empty(rows, columns, dtype=torch.bfloat16), is_needed=True)
        total = of_operators.total
        assert total is not None
        expected = left[:, :_CHECKED_ROWS].double().t() @ right.double()
        for name, form in _forms(of_operators, left, right).items():

            def measure(form: Callable[[], object] = form, expected: Tensor = expected, total: Tensor = total) -> Any:
                total.zero_()
                form()
                error = float((total[:_CHECKED_ROWS] - expected).norm() / expected.norm())
                seconds = seconds_of(form, context.device)
                return {"error_to_fp64": error, "seconds": seconds}

            record = {"tokens": tokens, "form": name, **attempt(measure)}
            if "seconds" in record:
                record["tflops"] = 2 * tokens * rows * columns / record["seconds"] / 1e12
            found.append(record)
    return found
