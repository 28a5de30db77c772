"""What one layer needs in the backward, without what is kept per layer: python -m benchmarks.working_set

A dry run on fake tensors, so no memory and no accelerator is needed: decoder layers of Llama 3.1 8B, bf16, with the
CPU's flash attention for every contender. What is kept per layer (inputs, outputs of attention, gradients of
parameters) grows with the number of layers and drops out of 2 x peak(2 layers) - peak(4 layers). Nobody but the layers
holds the first one's input and the last one's output, as in training.

This project's contenders have a row for each of --layer_chunks. "attention again" in several is StreamBP's way (arXiv
2506.03077): attention runs a second time, and keys and values are projected again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from benchmarks.contenders import CONTENDERS, IN_LAYER_CHUNKS, Work, build_contender
from benchmarks.sizes import SIZES
from mst_ds.config import parse_seq_len
from mst_ds.memory.dry_run import as_on_an_accelerator, host_left_out
from mst_ds.memory.live import LiveMemory

_COMPARED = ("recompute", "DeepSpeed ALST", "mst_ds, attention again", "mst_ds", "mst_ds, offload")
_FEW, _MANY = 2, 4


def peak_bytes(name: str, num_layers: int, *, size: str, work: Work) -> int:
    """The most bytes alive in the backward of `num_layers` layers, given the gradient of their output."""
    seq_len = work.seq_len
    config = SIZES[size].config(num_hidden_layers=num_layers, max_position_embeddings=seq_len)
    # Plans are applied on the meta device: finding a model's structure runs small real tensors.
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(SIZES[size].dtype).train()
    contender = build_contender(name, model, work)
    with FakeTensorMode(), as_on_an_accelerator():
        contender.model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        token = torch.empty((1, 1, config.hidden_size), dtype=SIZES[size].dtype, requires_grad=True)
        gradient = torch.empty((1, seq_len, config.hidden_size), dtype=SIZES[size].dtype)
        with LiveMemory() as memory, host_left_out(memory), _no_mask():
            output = get_gradient_edge(contender.hidden_states(token.repeat(1, seq_len, 1)))
            memory.reset_peak()
            torch.autograd.backward(output, gradient)
    return memory.peak


def _no_mask() -> AbstractContextManager[object]:
    """transformers leaves the mask out where a real sequence is all causal, but not where it sees fake tensors."""
    return patch.object(modeling_llama, "create_causal_mask", lambda **_: None)


def working_set(
    name: str, *, size: str = "llama-3.1-8b-layers", seq_len: int = 65536, chunks: int = 16, layer_chunks: int = 1
) -> float:
    """A layer's working set in the backward, in units of length x hidden x bytes of an element."""
    work = Work(seq_len, chunks, chunks, layer_chunks)
    few, many = (peak_bytes(name, layers, size=size, work=work) for layers in (_FEW, _MANY))
    unit = seq_len * SIZES[size].config().hidden_size * SIZES[size].dtype.itemsize
    return (_MANY * few - _FEW * many) / (_MANY - _FEW) / unit


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.working_set",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=_COMPARED)
    parser.add_argument("--size", choices=SIZES, default="llama-3.1-8b-layers")
    parser.add_argument("--seq_len", type=parse_seq_len, default=65536, help="Tokens: 65536, 1M.")
    parser.add_argument("--chunks", type=int, default=16, help="Chunks of an MLP, of all tokens.")
    parser.add_argument("--layer_chunks", nargs="+", type=int, default=[1, 8, 32], help="Chunks of a layer.")
    options = parser.parse_args(argv)
    table = Table("contender", "layer chunks", "length x hidden", title=f"{options.size}, {options.seq_len} tokens")
    for name in options.contenders:
        for count in options.layer_chunks if name in IN_LAYER_CHUNKS else [1]:
            work = {"seq_len": options.seq_len, "chunks": options.chunks, "layer_chunks": count}
            units = working_set(name, size=options.size, **work)
            table.add_row(name, str(count) if name in IN_LAYER_CHUNKS else "", f"{units:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
