"""Flash attention from the Hugging Face hub, which the library `kernels` downloads and imports."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

FLASH_2_OF_HUB = "kernels-community/flash-attn2"
FLASH_3_OF_HUB = ("kernels-community/flash-attn3", "kernels-community/vllm-flash-attn3")
HUB_KERNELS = (FLASH_2_OF_HUB, *FLASH_3_OF_HUB)
# Its builds have code for 8.0 and 9.0a, of which the latter runs nowhere else (`build.toml` of the repositories).
_FIRST_WITHOUT_FLASH_3 = (10, 0)


@cache
def hub_flash_attention(name: str) -> Any:
    """The module `flash_attn_interface` of a repository, in the version that transformers 5.23 takes of it.

    Args:
        name: one of `HUB_KERNELS`.

    Raises:
        ValueError: `kernels` is not installed or cannot load the repository, functions are missing from it, or it has
            no code for this device.
    """
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if name in FLASH_3_OF_HUB and capability >= _FIRST_WITHOUT_FLASH_3:
        raise ValueError(
            f'attention "{name}" is built for compute capabilities 8 and 9, and this device has '
            f'{".".join(map(str, capability))}: use "sdpa"'
        )
    try:
        from kernels import get_kernel

        package = get_kernel(name, version=_version(name))
    except ModuleNotFoundError as error:
        if error.name != "kernels":
            raise _not_loaded(name, error) from error
        raise ValueError(
            f'attention "{name}" needs the package kernels: install it (pip install kernels), or use "sdpa"'
        ) from None
    # Of the network, the hub, the import, the loader of shared libraries: there is no common class below this one.
    except Exception as error:
        raise _not_loaded(name, error) from error
    interface = getattr(package, "flash_attn_interface", None)
    kinds = ("", "_varlen") if name == FLASH_2_OF_HUB else ("",)
    wanted = [f"_flash_attn{kind}_{direction}" for kind in kinds for direction in ("forward", "backward")]
    missing = [function for function in wanted if not hasattr(interface, function)]
    if missing:
        raise ValueError(f'attention "{name}" has no {", ".join(missing)} in its flash_attn_interface: use "sdpa"')
    return interface


def _not_loaded(name: str, error: Exception) -> ValueError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return ValueError(f'attention "{name}" is not loaded by the package kernels ({reason}): use "sdpa"')


def _version(name: str) -> int:
    if name != FLASH_2_OF_HUB:
        return 1
    return 4 if torch.__version__ >= "2.10" else 3
