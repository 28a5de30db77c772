"""Whether the package flash-attn is here in a version whose interface is that of FlashAttention 2."""

from __future__ import annotations

from importlib.util import find_spec


def flash_attn_2_version() -> str | None:
    """The version of the package, 2.x; None where `flash_attn_func` cannot be imported from it.

    FlashAttention 4 (flash-attn-4) installs `flash_attn.cute`: then a namespace `flash_attn` is found, with nothing of
    FlashAttention 2 in it.
    """
    # Slow to import, and few models ask for it.
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("flash-attn")
    except PackageNotFoundError:
        return None
    if installed.split(".")[0] != "2" or find_spec("flash_attn") is None:
        return None
    return installed if find_spec("flash_attn.flash_attn_interface") is not None else None
