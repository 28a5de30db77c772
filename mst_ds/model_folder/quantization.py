"""Weights that were published quantised, as the plain ones that training needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mst_ds.model_shape import quantization_fields

if TYPE_CHECKING:
    from torch import Tensor

# Of a value of 4 bits, e2m1: the sign is its highest bit.
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_EXPONENT_BIAS = 127
_BLOCKS, _SCALES = "_blocks", "_scales"
_SCALE = "_scale_inv"
_ACTIVATION_SCALE = ".activation_scale"


@dataclass(frozen=True)
class Quantization:
    """How a model's weights are stored.

    Args:
        method: "mxfp4", "fp8" or "mxfp8".
        block: rows and columns of a weight that share a scale; None: all share one.
    """

    method: str
    block: tuple[int, int] | None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Quantization | None:
        """Of a model's config.json; None for one that is not quantised.

        Raises:
            ValueError: the size of its blocks is not two numbers.
        """
        found = quantization_fields(fields)
        if found is None:
            return None
        block = found.get("weight_block_size")
        is_two = isinstance(block, list | tuple) and len(block) == 2
        if block is not None and not (is_two and all(type(size) is int and size > 0 for size in block)):
            raise ValueError(f"weight_block_size in quantization_config is {block!r}; allowed: two whole numbers >= 1")
        return cls(found["quant_method"], None if block is None else tuple(block))

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights that the stored tensors stand for, by the names that they have where nothing is quantised.

        Tensors without memory give tensors without memory. What is not quantised stays as it is.

        Raises:
            ValueError: a scale has no weight, or not the size of its blocks.
        """
        return self._from_mxfp4(stored, dtype) if self.method == "mxfp4" else self._from_fp8(stored, dtype)

    def _from_mxfp4(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        weights = {}
        for name in stored:
            whole = name.removesuffix(_BLOCKS).removesuffix(_SCALES)
            if whole == name:
                weights[name] = stored[name]
            elif whole + _BLOCKS not in stored or whole + _SCALES not in stored:
                raise ValueError(
                    f"weights {whole} in MXFP4 lack their {_SCALES if name.endswith(_BLOCKS) else _BLOCKS}"
                )
            elif name.endswith(_BLOCKS):
                weights[whole] = _dequantize_mxfp4(whole, stored[name], stored[whole + _SCALES], dtype)
        return weights

    def _from_fp8(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        weights = {}
        for name in stored:
            if name.endswith(_ACTIVATION_SCALE):
                continue  # of no use where activations are not quantised
            if name.endswith(_SCALE):
                if name.removesuffix(_SCALE) not in stored:
                    raise ValueError(f"the scale {name} has no weight {name.removesuffix(_SCALE)}")
            elif name + _SCALE in stored:
                weights[name] = self._dequantize_fp8(name, stored[name], stored[name + _SCALE], dtype)
            else:
                weights[name] = stored[name]
        return weights

    def _dequantize_fp8(self, name: str, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The last two dimensions of a weight (R, C) are in blocks, the last of which may be smaller."""
        if weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise ValueError(
                f"weight {name} has a scale, but is in {_word(weight.dtype)}; allowed: 8 bits of floating point"
            )
        factor = scale.float()
        if scale.dtype == torch.uint8:
            factor = torch.exp2(factor - _EXPONENT_BIAS)
        if scale.numel() == 1:
            factor = factor.reshape(())
        else:
            rows, columns = weight.shape[-2:]
            block = self.block or (rows, columns)
            blocks = (*weight.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
            if tuple(scale.shape) != blocks:
                raise ValueError(
                    f"the scale of weight {name} has the shape {tuple(scale.shape)}; allowed: {blocks}, for blocks of "
                    f"{block[0]} by {block[1]}"
                )
            factor = factor.repeat_interleave(block[0], -2)[..., :rows, :]
            factor = factor.repeat_interleave(block[1], -1)[..., :columns]
        return (weight.float() * factor).to(dtype)


def _dequantize_mxfp4(name: str, blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(E, R, C/32, 16) bytes of two values, a scale (E, R, C/32) for each 32 -> (E, C, R), as experts keep them."""
    if blocks.dim() != 4 or blocks.shape[:-1] != scales.shape or {blocks.dtype, scales.dtype} != {torch.uint8}:
        raise ValueError(
            f"weights {name} in MXFP4 have blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)}, in "
            f"{_word(blocks.dtype)} and {_word(scales.dtype)}; allowed: uint8, a scale for each block of 32 values"
        )
    experts, rows = blocks.shape[:2]
    weight = torch.empty(experts, rows, blocks[0, 0].numel() * 2, dtype=dtype, device=blocks.device)
    values = torch.tensor(_FP4_VALUES, dtype=torch.float32, device=blocks.device)
    for expert in range(experts):  # one at a time: the indices take eight times the bytes
        pairs = torch.stack((blocks[expert] & 0x0F, blocks[expert] >> 4), dim=-1).flatten(-2)
        factors = torch.exp2(scales[expert].float() - _EXPONENT_BIAS).unsqueeze(-1)
        weight[expert] = (values[pairs.int()] * factors).flatten(-2).to(dtype)
    return weight.transpose(1, 2).contiguous()


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
