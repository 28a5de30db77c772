"""The optimizers that a run makes itself, by the names of transformers; without a library."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Optimizer:
    """What others know of an optimizer.

    moments: values that it keeps for each trained parameter beside its master copy.
    in_8_bits: these are of 8 bits, with a scale in fp32 for each block of `BLOCK_OF_8_BITS` elements.
    types: how a DeepSpeed JSON may call it, in small letters.
    """

    moments: int
    in_8_bits: bool = False
    types: tuple[str, ...] = ()


ADAMW = "adamw_torch"
BLOCK_OF_8_BITS = 256
# bitsandbytes keeps a smaller tensor in fp32.
LEAST_OF_8_BITS = 4096
_BITSANDBYTES = Optimizer(moments=2, in_8_bits=True)
_FUSED_ADAMW = Optimizer(moments=2, types=("adamw", "adam"))
OPTIMIZERS: Mapping[str, Optimizer] = {
    ADAMW: _FUSED_ADAMW,
    "adamw_torch_fused": _FUSED_ADAMW,
    "adamw_bnb_8bit": _BITSANDBYTES,
    "adamw_8bit": _BITSANDBYTES,
    "sgd": Optimizer(moments=0, types=("sgd",)),
}
_REFUSED: Mapping[str, str] = {
    "adamw_torch_8bit": "torchao leaves a shard in fp32 whose elements are no multiple of 256, as most of ZeRO's are; "
    "allowed: adamw_8bit, of bitsandbytes",
    "muon": "DeepSpeed makes it alone, and without ZeRO only as it is published; allowed: a block 'optimizer' of type "
    "Muon in the DeepSpeed JSON at ZeRO stage 0",
}
_OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")


def check_optim(name: str, given: Collection[str]) -> None:
    """Check `--optim`, beside the names of the flags that were given.

    Raises:
        ValueError: no run makes such an optimizer, or a flag would be without effect.
    """
    if name in _REFUSED:
        raise ValueError(f"optim is {name!r}: {_REFUSED[name]}")
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        hint = f"; nearest: {near[0]!r}" if near else ""
        raise ValueError(
            f"optim is {name!r}; allowed: {', '.join(OPTIMIZERS)}, or a block 'optimizer' in the DeepSpeed JSON{hint}"
        )
    for flag in _OF_ADAM:
        if OPTIMIZERS[name].moments == 0 and flag in given:
            raise ValueError(f"{flag} is given, but optim is {name!r}, which has none; allowed: no --{flag}")
