"""Adapters of peft, such as LoRA: they are trained, the model's own weights are not."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

from mst_ds.adapter_flags import ALL_LINEAR, MOST_ALPHA, MOST_RANK, AdapterRequest
from mst_ds.command_line.flags import words_in
from mst_ds.files.read_file import existing_file, expanded, read_json

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

ADAPTER_FILE = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def requested_config(request: AdapterRequest | None) -> PeftConfig | None:
    """The config of the adapters that a run trains; None: it trains the model itself.

    Raises:
        ValueError: the file that `request` names is not there or cannot be trained, or peft is not installed.
    """
    if request is None:
        return None
    if request.peft_config is not None:
        return load_peft_config(request.peft_config)
    if request.adapter is not None:
        config = saved_config(request.adapter)
        # Another name than this run's model would have peft warn.
        config.base_model_name_or_path = None
        return config
    _require_peft("lora_r")
    from peft import LoraConfig

    names = words_in(request.lora_target_modules)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=request.lora_r or 0,
        lora_alpha=request.lora_alpha,
        lora_dropout=request.lora_dropout,
        # In a list it would be the name of a module.
        target_modules=ALL_LINEAR if names == [ALL_LINEAR] else names,
    )


def saved_config(adapter: str) -> PeftConfig:
    """That of a trained adapter, in a folder or of a Hugging Face id.

    Raises:
        ValueError: it has none, or see `load_peft_config`.
    """
    file = file_of_adapter(adapter, ADAPTER_FILE)
    if file is None:
        raise ValueError(f"adapter is {adapter!r}, which has no {ADAPTER_FILE}; allowed: the folder or id of one")
    _require_peft("adapter")
    return _read_config(file)


def saved_weights(adapter: str) -> Path:
    """The file with the values of a trained adapter, in a folder or of a Hugging Face id.

    Raises:
        ValueError: it has none.
    """
    found = (file_of_adapter(adapter, name) for name in _ADAPTER_WEIGHTS)
    file = next((file for file in found if file is not None), None)
    if file is None:
        raise ValueError(
            f"adapter {adapter!r} has no {' or '.join(_ADAPTER_WEIGHTS)}; allowed: one that was trained, or "
            f"--peft_config with its {ADAPTER_FILE} to begin anew"
        )
    return file


def file_of_adapter(adapter: str, name: str) -> Path | None:
    """A file of a folder, or of a Hugging Face id, which is got onto this machine; None: it has none.

    Raises:
        ValueError: the id cannot be reached.
    """
    if (folder := expanded(adapter, "adapter")).is_dir():
        return folder / name if (folder / name).is_file() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(adapter, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"adapter is {adapter!r}, no folder, and as an id it cannot be had: {reason}") from None
    return None if found is None else Path(found)


def _require_peft(flag: str) -> None:
    if find_spec("peft") is None:
        raise ValueError(f"{flag} needs the package peft: install it with pip install 'mst_ds[peft]'")


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
            f"peft_config {str(file)!r} is of an adapter that has been trained, {trained[0]}, and would be begun anew; "
            f"allowed: its {ADAPTER_FILE} in a folder of its own, for new adapters like it, or --adapter with its "
            "folder, to train it on"
        )
    _require_peft("peft_config")
    return _read_config(file)


def _read_config(file: Path) -> PeftConfig:
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
        if rank is not None and not (isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= MOST_RANK):
            refuse(name, rank, f"a whole number from 1 to {MOST_RANK}")
    alphas = {"lora_alpha": fields.get("lora_alpha"), **dict(_items(fields, "alpha_pattern"))}
    for name, alpha in alphas.items():
        if alpha is not None and not (is_number(alpha) and 0 < alpha <= MOST_ALPHA):
            refuse(name, alpha, f"a number > 0 and at most {MOST_ALPHA:g}")
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


def merge_adapters(adapted: PeftModel) -> PreTrainedModel:
    """The model of `adapted`, whose adapters are added to its weights in fp32, each of which is rounded once.

    Raises:
        Exception: of any type, by peft, where adapters of their kind or on such modules cannot be merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    with warnings.catch_warnings():
        # peft says of each layer that it has been merged when it takes the model out of them, and of a model partly
        # without memory that its embeddings are not tied.
        said = "Already following adapters were merged|All adapters are already merged|Input and output embeddings are"
        warnings.filterwarnings("ignore", said)
        # One after another, so that no more than one layer is there in fp32.
        for layer in [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]:
            base = layer.get_base_layer()
            dtype = next(base.parameters()).dtype
            layer.float()
            layer.merge()
            base.to(dtype)
        merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


def require_mergeable(model_config: PreTrainedConfig, peft_config: PeftConfig) -> None:
    """Refuse adapters that could not be merged at the end of a run, on tensors without memory.

    Raises:
        ValueError: peft cannot merge them, the merged model is made in another way, or they change one of two weights
            that are tied.
    """
    # peft changes the configs that it gets.
    plain = model_on_meta(copy.deepcopy(model_config), None)[0]
    adapted: Any = model_on_meta(copy.deepcopy(model_config), copy.deepcopy(peft_config))[1]
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    for name in _tied_names(plain):
        module = name.rpartition(".")[0]
        if any(f".{module}." in f".{each}" for each in trained):
            raise ValueError(
                f"merge_adapter is true, but the adapters change {module}, whose weight is tied to another; allowed: "
                "adapters on other modules, or no --merge_adapter"
            )
    try:
        merged = merge_adapters(adapted)
    except Exception as error:
        raise ValueError(_of_library("merge_adapter is true, but the merged model", error)) from error
    expected, found = ({name: value.shape for name, value in each.state_dict().items()} for each in (plain, merged))
    if found != expected:
        name = sorted(expected.keys() ^ found.keys() or [name for name in expected if expected[name] != found[name]])[0]
        raise ValueError(
            f"merge_adapter is true, but {name} of the merged model is not as in the model itself; allowed: no "
            "--merge_adapter"
        )


def _tied_names(model: PreTrainedModel) -> list[str]:
    """Names of parameters that are one with another."""
    named = list(model.named_parameters(remove_duplicate=False))
    times = Counter(id(parameter) for _, parameter in named)
    return [name for name, parameter in named if times[id(parameter)] > 1]


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
