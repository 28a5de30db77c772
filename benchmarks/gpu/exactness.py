"""Gradients in 16 bits, beside those of transformers in 16 bits: how far each is from transformers' own in fp32."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from benchmarks.contenders import IGNORE_INDEX, Contender, Work, build_contender
from benchmarks.gpu.sections import Context

KEYS = ("bound", "cases")
BOUND = 1.1  # times the error of transformers
_CHUNKS = 16
# By what is compared: the contender, and its chunks.
_COMPARED: Mapping[str, tuple[str, int]] = {
    "1 chunk": ("mst_ds, one chunk", 1),
    "16 chunks": ("mst_ds, attention again", _CHUNKS),
    "16 chunks, attention kept": ("mst_ds", _CHUNKS),
    "16 chunks, MLP kept": ("mst_ds, MLP kept", _CHUNKS),
    "16 chunks, no recompute": ("mst_ds, no recompute", _CHUNKS),
    "16 chunks, MLP kept, offload": ("mst_ds, MLP kept, offload", _CHUNKS),
}
_OF_WINDOW = ("16 chunks, attention kept", "16 chunks, no recompute")

Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One sequence (1, S) of documents, whose tokens predict nothing beyond their own document."""

    input_ids: Tensor
    lengths: tuple[int, ...]

    @property
    def batch(self) -> dict[str, Tensor]:
        """The labels and, where there are several documents, the positions that tell them apart."""
        labels = self.input_ids.clone()
        labels[0, [sum(self.lengths[:index]) for index in range(1, len(self.lengths))]] = IGNORE_INDEX
        if len(self.lengths) == 1:
            return {"labels": labels}
        positions = torch.cat([torch.arange(length, device=labels.device) for length in self.lengths])
        return {"labels": labels, "position_ids": positions[None]}

    def loss(self, model: Any) -> Tensor:
        """The loss by a forward for each document: no kernel and no mask has to tell them apart."""
        count = sum(length - 1 for length in self.lengths)
        parts = []
        for document in self.input_ids.split(self.lengths, dim=1):
            if document.shape[1] > 1:
                mean = model(input_ids=document, labels=document).loss
                parts.append(mean * ((document.shape[1] - 1) / count))
        return torch.stack(parts).sum()


def run(context: Context, results: dict[str, Any]) -> None:
    """One document, packed documents, and a sliding window at a length that no block size divides."""
    scale = context.scale
    results["bound"], results["cases"] = BOUND, []
    config, length = scale.exact.config(), scale.exact_length
    packed = scale.exact_documents
    window = MistralConfig(**_dimensions(config), sliding_window=scale.window)
    _compare(context, config, "one document", (length,), tuple(_COMPARED), results["cases"])
    _compare(context, config, "packed", packed, tuple(_COMPARED), results["cases"])
    for name, lengths in (("window", (length - 3,)), ("window, packed", packed)):
        _compare(context, window, name, lengths, _OF_WINDOW, results["cases"])


def _dimensions(config: LlamaConfig) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(config, name) for name in (*names, "vocab_size", "tie_word_embeddings")} | {
        "use_cache": False,
        "attn_implementation": "sdpa",
    }


def _compare(
    context: Context,
    config: Any,
    case: str,
    lengths: tuple[int, ...],
    compared: Sequence[str],
    records: list[dict[str, Any]],
) -> None:
    torch.manual_seed(0)
    with context.device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=context.scale.exact.dtype).train()
        row = Row(torch.randint(config.vocab_size, (1, sum(lengths))), lengths)
    truth_loss, truth = _truth(model, row)
    loss, plain = _gradients(model, lambda: model(input_ids=row.input_ids, **row.batch).loss)
    expected = _errors(plain, truth)
    records.append({"case": case, "model": "transformers", "loss_error": abs(loss - truth_loss), **_summary(expected)})
    for name in compared:
        contender_name, chunks = _COMPARED[name]
        contender: Contender = build_contender(contender_name, model, Work(sum(lengths), chunks, chunks))
        loss, found = _gradients(model, functools.partial(contender.loss, row.input_ids, **row.batch))
        record = {"case": case, "model": name, "loss_error": abs(loss - truth_loss)}
        records.append({**record, **_against(_errors(found, truth), expected)})


def _truth(model: nn.Module, row: Row) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the same weights in fp32."""
    whole = copy.deepcopy(model).float()
    with _exact_fp32():
        return _gradients(whole, lambda: row.loss(whole))


def _gradients(model: nn.Module, loss_of: Callable[[], Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = loss_of()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


@contextmanager
def _exact_fp32() -> Iterator[None]:
    """Products of fp32 without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _errors(found: Gradients, truth: Gradients) -> dict[str, tuple[float, float]]:
    """By parameter the squared norms of the error and of the truth."""
    return {
        name: (float((found[name].float() - truth[name]).square().sum()), float(truth[name].square().sum()))
        for name in truth
    }


def _summary(errors: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    wrong, right = (sum(pair[index] for pair in errors.values()) for index in range(2))
    return {"gradient_error": math.sqrt(wrong / right), "finite": math.isfinite(wrong)}


def _against(errors: Mapping[str, tuple[float, float]], expected: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """The error of all gradients together as a multiple of transformers', and the parameter that is worst by it."""
    summary = _summary(errors)
    ratio = summary["gradient_error"] / _summary(expected)["gradient_error"]
    ratios = {name: _ratio(errors[name][0], expected[name][0]) for name in errors}
    worst = max(ratios, key=lambda name: math.inf if math.isnan(ratios[name]) else ratios[name])
    return {
        **summary,
        "ratio": ratio,
        "within": ratio <= BOUND,
        "worst_parameter": worst,
        "worst_parameter_ratio": ratios[worst],
        "parameters_above": sum(not each <= BOUND for each in ratios.values()),
    }


def _ratio(own: float, other: float) -> float:
    if other == 0:
        return 1.0 if own == 0 else math.inf
    return math.sqrt(own / other)


def lines(results: Mapping[str, Any]) -> list[str]:
    """The worst of each case."""
    shown = []
    for case in dict.fromkeys(record["case"] for record in results.get("cases", ())):
        compared = [record for record in results["cases"] if record["case"] == case and "ratio" in record]
        if compared:
            worst = max(compared, key=lambda record: record["ratio"] if record["finite"] else math.inf)
            within = all(record["within"] for record in compared)
            shown.append(
                f"{case}: {worst['ratio']:.2f} x transformers' error at most ({worst['model']}), "
                f"{'within' if within else 'ABOVE'} {BOUND}"
            )
    return shown
