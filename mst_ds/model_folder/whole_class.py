"""What transformers says of a multimodal model: where its language model is, and what files call its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from mst_ds.kept_in_fp32 import persistent_buffers

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel


def whole_on_meta(config: PreTrainedConfig, dtype: torch.dtype | None = None, **settings: Any) -> PreTrainedModel:
    """The multimodal model of a config, without memory.

    Raises:
        ValueError: transformers cannot build it.
    """
    from transformers import AutoModelForMultimodalLM

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForMultimodalLM.from_config(config, dtype=dtype, **settings)
    except Exception as error:  # whatever the model's class raises
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the model of type {config.model_type!r} cannot be built: {type(error).__name__}: {reason}"
        ) from error
    return model


def find_places(whole: PreTrainedModel, language: PreTrainedModel) -> dict[str, str]:
    """The language model's modules, by name, and those of the whole model that they are, by name.

    It is one module of the whole, or its decoder and its head are.

    Raises:
        ValueError: the whole model has no such modules, or more than one.
    """
    modules: dict[str, nn.Module] = {"": language}
    if not _named_like(whole, language):
        modules = {name: child for name, child in language.named_children() if child.state_dict()}
    heads = (whole.get_output_embeddings(), language.get_output_embeddings())
    places = {}
    for name, module in modules.items():
        found = [place for place, each in whole.named_modules() if each is heads[0]]
        if module is not heads[1]:
            found = _named_like(whole, module)
        if len(found) != 1:
            raise ValueError(_refusal(whole, f"{len(found)} modules like {name or 'it'} of {type(language).__name__}"))
        places[name] = found[0]
    _require_same(whole, language, places)
    return places


def place_of(name: str, places: Mapping[str, str]) -> str:
    """The name in the whole model of one of the language model."""
    for own, place in places.items():
        prefix = f"{own}." if own else ""
        if name.startswith(prefix):
            return f"{place}.{name[len(prefix) :]}"
    raise KeyError(name)


def stored_names(whole: PreTrainedModel, places: Mapping[str, str], stored: Iterable[str]) -> dict[str, str]:
    """Of the language model's tensors: the name that its own class knows, and the stored one.

    Args:
        stored: the names of the whole model's tensors in files; those that are of no part of it are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    # What else the loader does, such as stacking experts, it does in the language model's own class, too.
    renamings = [each for each in get_model_conversion_mapping(whole) if isinstance(each, WeightRenaming)]
    known = whole.state_dict()
    names = {}
    for name in stored:
        in_whole = rename_source_key(name, renamings, [], whole.base_model_prefix, known)[0]
        in_whole = name if in_whole not in known and name in known else in_whole
        for own, place in places.items():
            if in_whole.startswith(f"{place}."):
                names[f"{own}{in_whole[len(place) :]}".removeprefix(".")] = name
    return names


def default_names(whole: PreTrainedModel) -> list[str]:
    """The names that transformers gives the tensors of a model that was not loaded, when it saves it."""
    from transformers.core_model_loading import revert_weight_conversion

    return list(revert_weight_conversion(whole, _own_tensors(whole)))


def initialised_rest(whole: PreTrainedModel, places: Mapping[str, str], seed: int) -> dict[str, Tensor]:
    """Random tensors of all but the language model, as transformers draws them, by the names that they are saved by.

    Args:
        whole: without memory; it gets some here for all but the language model.
    """
    from transformers.core_model_loading import revert_weight_conversion

    language: set[Any] = {module for place in places.values() for module in whole.get_submodule(place).modules()}
    for module in whole.modules():
        if module not in language:
            module.to_empty(device="cpu", recurse=False)
        # transformers passes by what it has drawn, as it has all of it without memory.
        module._is_hf_initialized = module in language  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole.initialize_weights()
    drawn = {name: tensor for name, tensor in _own_tensors(whole).items() if not tensor.is_meta}
    return revert_weight_conversion(whole, drawn)


def _named_like(whole: PreTrainedModel, module: nn.Module) -> list[str]:
    return [name for name, each in whole.named_modules() if type(each) is type(module)]


def _own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    return {name: each.detach() for name, each in model.named_parameters()} | persistent_buffers(model)


def _require_same(whole: PreTrainedModel, language: PreTrainedModel, places: Mapping[str, str]) -> None:
    """Whether all of the language model is at its places, and its head tied or not as there."""
    in_whole = {name: tensor.shape for name, tensor in whole.state_dict().items()}
    for name, tensor in language.state_dict().items():
        if in_whole.get(place_of(name, places)) != tensor.shape:
            raise ValueError(_refusal(whole, f"no {place_of(name, places)} like {name} of {type(language).__name__}"))
    if _is_tied(whole) != _is_tied(language):
        raise ValueError(_refusal(whole, f"another rule than {type(language).__name__} for tying head and embedding"))


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _refusal(whole: PreTrainedModel, has: str) -> str:
    return (
        f"{type(whole).__name__} is multimodal and has {has}; allowed: one whose language model is a model of its own "
        "in transformers"
    )
