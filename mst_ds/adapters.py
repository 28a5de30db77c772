"""Adapters of peft, such as LoRA: they are trained, the model's own weights are not."""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

from mst_ds.files.read_file import existing_file, expanded, read_json

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

ADAPTER_FILE = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# No matrix of a model is larger; a larger factor has no use.
_MOST_RANK = 2**20
_MOST_ALPHA = 1e6


def load_peft_config(path: str) -> PeftConfig:
    """Read an `adapter_config.json`, as peft writes it, from the file or its folder.

    Raises:
        ValueError: no such file, not a config of peft, trained weights beside it, an adapter that learns a prompt, or
            peft is not installed.
    """
    given = expanded(path, "peft_config")
    kind = f"an existing {ADAPTER_FILE}, or a folder with one"
    file = existing_file(given / ADAPTER_FILE if given.is_dir() else given, "peft_config", kind)
    if trained := [name for name in _ADAPTER_WEIGHTS if (file.parent / name).is_file()]:
        raise ValueError(
            f"peft_config {str(file)!r} is of an adapter that has been trained, {trained[0]}, which mst_ds does not "
            f"continue; allowed: its {ADAPTER_FILE} in a folder of its own, for new adapters like it, or --resume for "
            "the checkpoint of a run"
        )
    if find_spec("peft") is None:
        raise ValueError("peft_config needs the package peft: install it with pip install 'mst_ds[peft]'")
    from peft import PeftConfig

    fields = read_json(file)
    if not isinstance(fields, dict):
        raise ValueError(f"peft_config {file} holds a {type(fields).__name__}; allowed: an object with peft's keys")
    _check_fields(file, fields)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            config: PeftConfig = PeftConfig.from_peft_type(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"peft_config {file} is not a config of peft: {' '.join(str(error).split())}") from None
    known = [field.name for field in dataclasses.fields(config)]
    for key in fields:
        # peft leaves out what it does not know: what a later peft has, but typing errors too.
        if key not in known and (near := difflib.get_close_matches(key, known, n=1, cutoff=0.85)):
            raise ValueError(f"peft_config {file} has the unknown key {key!r}; nearest: {near[0]!r}")
    for field in dataclasses.fields(config):
        # Any other value would be taken for true.
        if field.type in ("bool", bool) and not isinstance(fields.get(field.name, False), bool):
            raise ValueError(f"{field.name} in peft_config {file} is {fields[field.name]!r}; allowed: true or false")
    if config.is_prompt_learning:
        raise ValueError(
            f"peft_config {file} learns a prompt, which mst_ds does not train; allowed: adapters like LORA"
        )
    for warning in said:
        warnings.warn(warning.message, warning.category, stacklevel=2)
    # A saved adapter says that it is for inference, where it would be frozen.
    config.inference_mode = False
    config.task_type = "CAUSAL_LM"
    return config


def _check_fields(file: Path, fields: Mapping[str, Any]) -> None:
    """Numbers and patterns that peft looks at late, in the middle of a model, or not at all."""

    def refuse(name: str, value: object, allowed: str) -> NoReturn:
        raise ValueError(f"{name} in peft_config {file} is {value!r}; allowed: {allowed}")

    def is_number(value: object) -> TypeGuard[float]:
        return isinstance(value, int | float) and not isinstance(value, bool)

    ranks = {"r": fields.get("r"), **{f"rank_pattern.{key}": rank for key, rank in _items(fields, "rank_pattern")}}
    for name, rank in ranks.items():
        if rank is not None and not (isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= _MOST_RANK):
            refuse(name, rank, f"a whole number from 1 to {_MOST_RANK}")
    alphas = {"lora_alpha": fields.get("lora_alpha"), **dict(_items(fields, "alpha_pattern"))}
    for name, alpha in alphas.items():
        if alpha is not None and not (is_number(alpha) and 0 < alpha <= _MOST_ALPHA):
            refuse(name, alpha, f"a number > 0 and at most {_MOST_ALPHA:g}")
    dropout = fields.get("lora_dropout")
    if dropout is not None and not (is_number(dropout) and 0 <= dropout < 1):
        refuse("lora_dropout", dropout, "a number from 0 up to, not including, 1")
    patterns = [(name, fields.get(name)) for name in ("target_modules", "exclude_modules")]
    patterns += [(f"rank_pattern.{key}", key) for key, _ in _items(fields, "rank_pattern")]
    for name, pattern in patterns:
        if isinstance(pattern, str) and pattern != "all-linear":
            try:
                re.compile(pattern)
            except re.error as error:
                refuse(
                    name, pattern, f"a list of names, 'all-linear' or a regular expression, which this is not ({error})"
                )


def _items(fields: Mapping[str, Any], name: str) -> Iterable[tuple[str, Any]]:
    found = fields.get(name) or {}
    return found.items() if isinstance(found, dict) else ()


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

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    except Exception as error:
        # transformers, with what the config says: an unknown word is a KeyError, an odd size an assertion.
        for name, value in _words(model_config.to_dict()):
            if isinstance(error, KeyError) and error.args[:1] == (value,):
                kind = model_config.model_type
                raise ValueError(
                    f"{name} in the config of model type {kind!r} is {value!r}; allowed: a word that transformers knows"
                ) from error
        raise ValueError(_of_library(f"the model of type {model_config.model_type!r}", error)) from error
    if peft_config is None:
        return model, model
    for given in getattr(peft_config, "target_parameters", None) or ():
        if not any(f".{name}".endswith(f".{given}") for name, _ in model.named_parameters()):
            raise ValueError(
                f"target_parameters in peft_config has {given!r}, which no parameter of the model is called"
            )
    try:
        with torch.device("meta"):
            adapted = add_adapters(model, peft_config)
    except Exception as error:
        raise ValueError(_of_library("peft_config with this model", error)) from error
    names = [name for name, _ in model.named_modules()]
    for given in getattr(peft_config, "modules_to_save", None) or ():
        if not any(f".{name}.".find(f".{given}.") >= 0 for name in names):
            raise ValueError(f"modules_to_save in peft_config has {given!r}, which no module of the model is called")
    # On this device alone peft leaves adapters in torch's default dtype.
    for parameter in adapted.parameters():
        if dtype is not None:
            parameter.data = parameter.data.to(dtype)
    return model, adapted


def _of_library(what: str, error: Exception) -> str:
    """One line of what a library raises for a config; of some errors the text alone says nothing."""
    text = " ".join(str(error).split())
    return f"{what} cannot be built: {text if isinstance(error, ValueError) else f'{type(error).__name__}: {text}'}"


def _words(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", word) for key, word in _words(value))
        elif isinstance(value, str):
            yield name, value
