"""The multimodal model whose language model a run trains: the names of its files, and all that is not trained.

The language model is loaded, planned and trained as the class that transformers has for it alone. The rest, such as a
vision tower, is on no device: its tensors go from the source's files into those that are written, and the language
model's get the names of the source again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mst_ds.adapters import model_on_meta
from mst_ds.model_folder.contents import Weights
from mst_ds.model_folder.tensors import StoredTensors
from mst_ds.model_folder.whole_class import (
    default_names,
    find_places,
    initialised_rest,
    place_of,
    stored_names,
    whole_on_meta,
)
from mst_ds.model_shape import language_config, with_language_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

# In the folder of a checkpoint's model: what is not trained, and the names of what is.
REST_FILE = "rest.safetensors"
_NAMES = "language_model"


@dataclass(frozen=True)
class WholeModel:
    """A multimodal model with the language model that is trained inside it.

    Args:
        config: the whole model's.
        names: of the language model's tensors: as its own class has them in files, and as the whole's files do.
        places: of its modules, by name: those in the whole model, by name.
        weights: the whole's; None where a run starts from random ones.
        seed: of random ones.
        rest_file: of a checkpoint, in place of both.
    """

    config: PreTrainedConfig
    names: Mapping[str, str] = field(repr=False)
    places: Mapping[str, str]
    weights: Weights | None = None
    seed: int = 0
    rest_file: Path | None = None

    @classmethod
    def of(
        cls,
        config: PreTrainedConfig,
        language: PreTrainedModel,
        weights: Weights | None,
        *,
        dtype: torch.dtype,
        seed: int,
    ) -> WholeModel:
        """Find the language model in the whole one.

        Args:
            config: the whole model's.
            language: the language model alone; without memory will do.
            weights: the whole model's, which `require_match` has found right; None: random ones.
            dtype: of training.
            seed: of random ones.

        Raises:
            ValueError: the whole model has no such part.
        """
        whole = whole_on_meta(config)
        places = find_places(whole, language)
        stored = default_names(whole) if weights is None else weights.plain_headers(dtype)
        return cls(config, stored_names(whole, places, stored), places, weights, seed)

    def note(self, name: str) -> str:
        """What a user should know who trains the model of this name."""
        places = set(self.places.values())

        def others(module: nn.Module, prefix: str) -> Iterator[str]:
            for own, child in module.named_children():
                full = f"{prefix}{own}"
                if any(place.startswith(f"{full}.") for place in places):
                    yield from others(child, f"{full}.")
                elif full not in places:
                    yield own

        return (
            f"model {name!r} is multimodal: its language model is trained, on text; the rest "
            f"({', '.join(others(whole_on_meta(self.config), ''))}) is written as it is"
        )

    def language_part(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The language model's of the whole model's stored tensors, by the names that its own class knows."""
        return {own: stored[name] for own, name in self.names.items() if name in stored}

    def with_language(self, config: PreTrainedConfig) -> WholeModel:
        """The same with this config of the language model, which may have more rows for tokens."""
        return replace(self, config=with_language_config(self.config, config))

    def joined(self, state: Mapping[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """The whole model, without memory, and all that is saved of it, by the names that it has in files.

        Args:
            state: the language model's tensors, by their names in it.
        """
        in_files = self._as_in_files(state)
        tensors = {self.names.get(name) or place_of(name, self.places): tensor for name, tensor in in_files.items()}
        dtype = next(tensor.dtype for tensor in state.values())
        return whole_on_meta(self.config, dtype), tensors | self.rest(dtype)

    def rest(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All but the language model, by the names in files, each as it is stored.

        Args:
            dtype: of what is stored quantised, or nowhere.
        """
        language = set(self.names.values())
        if self.rest_file is not None:
            with StoredTensors((self.rest_file,)) as stored:
                return dict(stored)
        if self.weights is None:
            return initialised_rest(whole_on_meta(self.config, dtype), self.places, self.seed)
        with StoredTensors(self.weights.files) as stored:
            if self.weights.quantization is None:
                return {name: stored[name] for name in stored if name not in language}
            # Scales lie beside their weights.
            modules = {name.rpartition(".")[0] for name in language}
            rest = {name: stored[name] for name in stored if name.rpartition(".")[0] not in modules}
            return self.weights.quantization.dequantize(rest, dtype)

    def write_rest(self, folder: Path, dtype: torch.dtype) -> None:
        """Write what `of_checkpoint` reads into a checkpoint's folder of the model."""
        from safetensors.torch import save_file

        words = {_NAMES: json.dumps({"names": dict(self.names), "places": dict(self.places)})}
        save_file({name: each.contiguous() for name, each in self.rest(dtype).items()}, folder / REST_FILE, words)

    @classmethod
    def of_checkpoint(cls, folder: Path, config: PreTrainedConfig) -> WholeModel | None:
        """What `write_rest` wrote into this folder; None where the run's model was a decoder of text alone."""
        from safetensors import safe_open

        if not (folder / REST_FILE).is_file():
            return None
        with safe_open(folder / REST_FILE, framework="pt") as opened:
            found = json.loads(opened.metadata()[_NAMES])
        return cls(config, found["names"], found["places"], rest_file=folder / REST_FILE)

    def _as_in_files(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Where several tensors of files are one parameter, such as experts: as many as the whole's files have."""
        if state.keys() <= self.names.keys():
            return state
        from transformers.core_model_loading import revert_weight_conversion

        language = model_on_meta(language_config(self.config), None)[0]
        split: dict[str, Tensor] = revert_weight_conversion(language, dict(state))
        return min(state, split, key=lambda tensors: len(tensors.keys() - self.names.keys()))
