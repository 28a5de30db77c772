"""Model folders of tiny models: whole, and quantised as models are published."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from tiny_models import SIZES
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def llama_folder(folder: Path, **dimensions: Any) -> Path:
    tiny_llama(**dimensions).save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    save_file(dict(change(load_file(folder / WEIGHTS))), folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def mxfp4_folder(folder: Path) -> Path:
    """GPT-OSS as it is published: experts in blocks of 32 values of 4 bits with a scale each, random ones here."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"intermediate_size": 32, "hidden_size": 64, "sliding_window": 8}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    GptOssForCausalLM(GptOssConfig(**sizes, rope_parameters=rope)).bfloat16().save_pretrained(folder)

    def quantise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, (experts, rows, columns // 32), dtype=torch.uint8)
            tensors[f"{name}_scales"] = scales
        return tensors

    change_weights(folder, quantise)
    change_config(folder, quantization_config={"quant_method": "mxfp4"})
    return folder


def fp8_folder(folder: Path, block: tuple[int, int] = (16, 16)) -> Path:
    """A Llama whose projections are in fp8 with a scale for each block, random ones."""
    tiny_llama().bfloat16().save_pretrained(folder)

    def quantise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in [name for name in tensors if "_proj" in name]:
            rows, columns = tensors[name].shape
            tensors[name] = torch.randn(rows, columns).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.rand(-(-rows // block[0]), -(-columns // block[1])) / 20 + 0.001
        return tensors

    change_weights(folder, quantise)
    change_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": list(block)})
    return folder
