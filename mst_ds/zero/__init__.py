"""What the DeepSpeed JSON says, without DeepSpeed: the only room that spells DeepSpeed's key names."""

from .config import (
    DsConfig,
    OffloadDevice,
    ResolvedConfig,
    ZeroConfig,
    ds_config_file,
    fill_steps,
    has_block,
    kept_blocks,
    load_ds_config,
    read_resolved,
    read_zero,
    resolve,
    split_mst,
)
from .owners import BATCH_FLAGS

__all__ = [
    "BATCH_FLAGS",
    "DsConfig",
    "OffloadDevice",
    "ResolvedConfig",
    "ZeroConfig",
    "ds_config_file",
    "fill_steps",
    "has_block",
    "kept_blocks",
    "load_ds_config",
    "read_resolved",
    "read_zero",
    "resolve",
    "split_mst",
]
