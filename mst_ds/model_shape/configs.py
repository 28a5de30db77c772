"""Finds configs: by shipped name, folder or Hugging Face id."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst_ds.config import nearest
from mst_ds.files.read_file import read_json
from mst_ds.model_shape.config_checks import ConfigValueError, check_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What transformers raises for words and numbers that it does not expect.
_OF_A_CONFIG = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
_LOGGERS = (
    "huggingface_hub.utils._http",
    "transformers.configuration_utils",
    "transformers.modeling_rope_utils",
)
_SHIPPED_CONFIGS = Path(__file__).parents[1] / "model_configs"
_CONFIG_FILE = "config.json"
_MODEL_CLASS = "AutoModelForCausalLM"

# Methods whose weights mst_ds dequantises when it loads them, exactly: a product of what is stored.
_DEQUANTIZED = ("mxfp4", "fp8", "mxfp8")

_POINTER = b"version https://git-lfs.github.com/spec/"
_FILES_THAT_ARE_READ = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".safetensors", ".bin")


def shipped_model_config(name: str) -> Path | None:
    """The folder of a config that ships with the package, or None."""
    return _SHIPPED_CONFIGS / name if name in _shipped_names() else None


def load_model_config(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Finds a config by shipped name, folder, or Hugging Face id, in this order; without its quantisation.

    With `trust_remote_code` the model's own code, if it has some, becomes what transformers makes a model of it with.

    Raises:
        ValueError: found in none of these places, not a config that transformers can read, of a model that needs code
            of its own, or quantised by a method that mst_ds does not dequantise.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    shipped = shipped_model_config(name_or_path)
    folder = shipped or Path(name_or_path)
    if folder.is_dir():
        _require_config(folder, name_or_path)
        read_json(folder / _CONFIG_FILE, is_finite=False)
    try:
        with _logged_if_found():
            config = AutoConfig.from_pretrained(
                str(folder) if folder.is_dir() else name_or_path, trust_remote_code=trust_remote_code
            )
            _require_code(config, name_or_path, trust_remote_code)
            check_numbers(config)
    except ConfigValueError:
        raise
    except (*_OF_A_CONFIG, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model {name_or_path!r} needs code that it brings itself, which is not run; allowed: "
                "--trust_remote_code true, where you trust that code and the command has the flag, or a model that "
                "transformers knows"
            ) from None
        names = _shipped_names()
        if folder.is_dir():
            # Errors of validation have their reason in the second line; that of an unknown type goes on for pages.
            is_of_field = isinstance(error, StrictDataclassError)
            reason = " ".join(str(error).split()) if is_of_field else str(error).partition("\n")[0]
            raise ValueError(f"model config {folder / _CONFIG_FILE} cannot be read: {reason}") from None
        raise ValueError(
            f"model {name_or_path!r} was not found{nearest(name_or_path, names)}; allowed: a shipped config "
            f"({', '.join(names)}), a folder with a config.json, or a Hugging Face id that can be reached"
        ) from None
    return _without_quantization(config, name_or_path)


def raw_model_config(name_or_path: str) -> dict[str, Any]:
    """The fields of a `config.json` as they are written, of what `load_model_config` has found."""
    from transformers import PreTrainedConfig

    fields: dict[str, Any] = PreTrainedConfig.get_config_dict(str(shipped_model_config(name_or_path) or name_or_path))[
        0
    ]
    return fields


def quantization_fields(fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How the weights of a model with these fields in its `config.json` are quantised, or None.

    Raises:
        ValueError: by a method that mst_ds does not dequantise.
    """
    text = fields.get("text_config")
    for owner in (fields, text if isinstance(text, Mapping) else {}):
        found = owner.get("quantization_config") or owner.get("compression_config")
        if not found:
            continue
        if not isinstance(found, Mapping):
            raise ValueError(f"quantization_config of the model is {found!r}; allowed: an object, or none")
        if (method := _method(found)) not in _DEQUANTIZED:
            raise ValueError(
                f"the model's weights are quantised by {method!r}, which mst_ds does not train; allowed: "
                f"{', '.join(_DEQUANTIZED)}, which are dequantised on loading, or the model that was quantised"
            )
        return found
    return None


def _method(quantization: Mapping[str, Any]) -> str:
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        return "bitsandbytes"
    return str(quantization.get("quant_method", "an unnamed method"))


def _without_quantization(config: PreTrainedConfig, name_or_path: str) -> PreTrainedConfig:
    """The config of the weights as they are when they have been loaded."""
    owners = [config, config.get_text_config()]
    quantised = [owner for owner in owners if getattr(owner, "quantization_config", None) is not None]
    if quantised or any(hasattr(owner, "compression_config") for owner in owners):
        quantization_fields(raw_model_config(name_or_path))
    for owner in quantised:
        if hasattr(owner, "quantization_config"):
            del owner.quantization_config
    return config


def _require_code(config: PreTrainedConfig, name_or_path: str, trust_remote_code: bool) -> None:
    """Makes the model's own code, where there is some, what the config stands for.

    Raises:
        ValueError: transformers has no class for the config, or would get attention from the hub, and the code is not
            trusted; it names `trust_remote_code`.
    """
    attention = getattr(config, "_attn_implementation", None)
    if "/" in str(attention) and not trust_remote_code:  # a repository of kernels
        raise ValueError(f"the attention {attention} of {name_or_path} needs trust_remote_code")
    reference = (getattr(config, "auto_map", None) or {}).get(_MODEL_CLASS)
    if reference is None:
        return
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not trust_remote_code:
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{name_or_path} needs trust_remote_code")
        return
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    model_class: Any = get_class_from_dynamic_module(reference, name_or_path)
    AutoModelForCausalLM.register(type(config), model_class, exist_ok=True)
    # So that its code is saved beside the weights.
    model_class.register_for_auto_class(_MODEL_CLASS)


def require_no_pointers(folder: Path) -> None:
    """Refuse a folder whose files were not fetched from where Git LFS keeps them.

    Raises:
        ValueError: what a model or tokenizer is read from is a pointer.
    """
    pointers = [path.name for path in sorted(folder.iterdir()) if _is_pointer(path)]
    if pointers:
        raise ValueError(
            f"{pointers[0]} in {str(folder)!r} is a pointer of Git LFS, not the file ({len(pointers)} such files); "
            "allowed: the files themselves: git lfs pull, or hf download"
        )


def _is_pointer(path: Path) -> bool:
    if path.suffix not in _FILES_THAT_ARE_READ or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _require_config(folder: Path, name: str) -> None:
    if (folder / _CONFIG_FILE).is_file():
        require_no_pointers(folder)
    elif (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"model folder {name!r} has an adapter and no model; allowed: the folder or Hugging Face id of the model "
            "that the adapter is for, or of one that it is merged into"
        )
    else:
        found = "GGUF files and no config.json" if any(folder.glob("*.gguf")) else "no config.json"
        raise ValueError(
            f"model folder {name!r} has {found}; allowed: a folder with one, and with weights in .safetensors, as "
            "save_pretrained of transformers writes it"
        )


@contextmanager
def _logged_if_found() -> Iterator[None]:
    """What is logged of a model is said afterwards, and not where it is refused: then the error says it.

    The hub's client would say two lines for each retry, transformers one for a word that it does not know.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    held: list[tuple[logging.Logger, logging.LogRecord]] = []

    def holding(logger: logging.Logger) -> Callable[[logging.LogRecord], bool]:
        def hold(record: logging.LogRecord) -> bool:
            held.append((logger, record))
            return False

        return hold

    filters = [(logger, holding(logger)) for logger in loggers]
    for logger, hold in filters:
        logger.addFilter(hold)
    try:
        yield
    finally:
        for logger, hold in filters:
            logger.removeFilter(hold)
    for logger, record in held:
        logger.handle(record)


def _shipped_names() -> list[str]:
    return sorted(path.parent.name for path in _SHIPPED_CONFIGS.glob("*/config.json"))
