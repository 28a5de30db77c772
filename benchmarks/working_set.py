"""What one layer needs in the backward, without what is kept per layer: python -m benchmarks.working_set

A dry run on fake tensors, so no memory and no accelerator is needed: decoder layers of Llama 3.1 8B, bf16, with the
CPU's flash attention for every contender. What is kept per layer (inputs, outputs of attention, gradients of
parameters) grows with the number of layers and drops out of 2 x peak(2 layers) - peak(4 layers).
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
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from benchmarks.contenders import CONTENDERS, Work, build_contender
from benchmarks.sizes import SIZES
from mst_ds.memory.dry_run import as_on_an_accelerator, host_left_out
from mst_ds.memory.live import LiveMemory

_COMPARED = ("recompute", "DeepSpeed ALST", "mst_ds, attention again", "mst_ds", "mst_ds, offload")
_FEW, _MANY = 2, 4


def peak_bytes(name: str, num_layers: int, *, size: str, seq_len: int, chunks: int) -> int:
    """The most bytes alive in the backward of `num_layers` layers, given the gradient of their output."""
    config = SIZES[size].config(num_hidden_layers=num_layers, max_position_embeddings=seq_len)
    # Plans are applied on the meta device: finding a model's structure runs small real tensors.
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(SIZES[size].dtype).train()
    contender = build_contender(name, model, Work(seq_len, chunks, chunks))
    with FakeTensorMode(), as_on_an_accelerator():
        contender.model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        shape = (1, seq_len, config.hidden_size)
        inputs = torch.empty(shape, dtype=SIZES[size].dtype, requires_grad=True)
        gradient = torch.empty(shape, dtype=SIZES[size].dtype)
        with LiveMemory() as memory, host_left_out(memory), _no_mask():
            hidden_states = contender.hidden_states(inputs)
            memory.reset_peak()
            hidden_states.backward(gradient)
    return memory.peak


def _no_mask() -> AbstractContextManager[object]:
    """transformers leaves the mask out where a real sequence is all causal, but not where it sees fake tensors."""
    return patch.object(modeling_llama, "create_causal_mask", lambda **_: None)


def working_set(name: str, *, size: str = "llama-3.1-8b-layers", seq_len: int = 65536, chunks: int = 16) -> float:
    """A layer's working set in the backward, in units of length x hidden x bytes of an element."""
    few, many = (peak_bytes(name, layers, size=size, seq_len=seq_len, chunks=chunks) for layers in (_FEW, _MANY))
    unit = seq_len * SIZES[size].config().hidden_size * SIZES[size].dtype.itemsize
    return (_MANY * few - _FEW * many) / (_MANY - _FEW) / unit


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.working_set", description=__doc__)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=_COMPARED)
    parser.add_argument("--size", choices=SIZES, default="llama-3.1-8b-layers")
    parser.add_argument("--seq_len", type=int, default=65536, help="Tokens.")
    parser.add_argument("--chunks", type=int, default=16, help="Chunks of an MLP.")
    options = parser.parse_args(argv)
    table = Table("contender", "length x hidden", title=f"{options.size}, {options.seq_len} tokens")
    for name in options.contenders:
        units = working_set(name, size=options.size, seq_len=options.seq_len, chunks=options.chunks)
        table.add_row(name, f"{units:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
