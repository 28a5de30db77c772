"""Adapters of peft, such as LoRA: they are trained, the model's own weights are not."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

ADAPTER_FILE = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def load_peft_config(path: str) -> PeftConfig:
    """Read an `adapter_config.json`, as peft writes it, from the file or its folder.

    Raises:
        ValueError: no such file, not a config of peft, trained weights beside it, an adapter that learns a prompt, or
            peft is not installed.
    """
    file = Path(path) / ADAPTER_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"peft_config is {path!r}; allowed: an existing {ADAPTER_FILE}, or a folder with one")
    if trained := [name for name in _ADAPTER_WEIGHTS if (file.parent / name).is_file()]:
        raise ValueError(
            f"peft_config {str(file)!r} is of an adapter that has been trained, {trained[0]}, which mst_ds does not "
            f"continue; allowed: its {ADAPTER_FILE} in a folder of its own, for new adapters like it, or --resume for "
            "the checkpoint of a run"
        )
    if find_spec("peft") is None:
        raise ValueError("peft_config needs the package peft: install it with pip install 'mst_ds[peft]'")
    from peft import PeftConfig

    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        config: PeftConfig = PeftConfig.from_peft_type(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"peft_config {file} is not a config of peft: {' '.join(str(error).split())}") from None
    if config.is_prompt_learning:
        raise ValueError(
            f"peft_config {file} learns a prompt, which mst_ds does not train; allowed: adapters like LORA"
        )
    # A saved adapter says that it is for inference, where it would be frozen.
    config.inference_mode = False
    config.task_type = "CAUSAL_LM"
    return config


def add_adapters(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Put new adapters into `model`, in its dtype, and freeze what is not part of them.

    Raises:
        ValueError: the model has no modules of the names that `config` targets.
    """
    from peft import get_peft_model

    return get_peft_model(model, config, autocast_adapter_dtype=False)


def model_on_meta(
    model_config: PreTrainedConfig, peft_config: PeftConfig | None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedModel | PeftModel]:
    """The model without memory, adapters in it, and the same as it is called: by peft, where there are adapters.

    Raises:
        ValueError: the model has no modules of the names that `peft_config` targets.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    if peft_config is None:
        return model, model
    with torch.device("meta"):
        adapted = add_adapters(model, peft_config)
    # On this device alone peft leaves adapters in torch's default dtype.
    for parameter in adapted.parameters():
        if dtype is not None:
            parameter.data = parameter.data.to(dtype)
    return model, adapted
