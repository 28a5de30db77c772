"""An adapter that was trained before: whether its weights are those of the adapters in a model, and their values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mst_ds.adapters import saved_config, saved_weights
from mst_ds.model_folder.contents import first_names
from mst_ds.model_folder.tensors import StoredTensors, read_headers
from mst_ds.model_folder.whole import WholeModel
from mst_ds.model_folder.whole_adapter import name_in_language

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


@dataclass(frozen=True)
class SavedAdapter:
    """Where the weights of a trained adapter are.

    Attributes:
        source: the folder or id, as the user gave it.
        base: the name of the model that it was trained on; None where it says none.
        headers: its tensors by the names that peft gives them, without memory.
        names: of these tensors, those in the file, which are others where it is an adapter of a multimodal model.
    """

    source: str
    base: str | None
    file: Path
    headers: Mapping[str, Tensor] = field(repr=False)
    names: Mapping[str, str] = field(repr=False)

    def note(self, model: str) -> str | None:
        """What a user should know of it who trains it on with `model`."""
        if self.base is None or self.base == model:
            return None
        return f"adapter {self.source!r} was trained on {self.base!r}, and goes on with {model!r}, of the same shapes"

    def require_match(self, adapted: PeftModel) -> None:
        """Refuse weights that are not those of the adapters in `adapted`, which may be without memory.

        Raises:
            ValueError: a tensor is missing, there is one more, or one has another shape or no floating point.
        """
        places, shapes = _places(adapted), {name: tensor.shape for name, tensor in adapted.state_dict().items()}
        own = _places(adapted, with_embeddings=False)
        wrong = [f"lacks {name}" for name in own if name not in self.headers]
        wrong += [f"has {name} too" for name in self.headers if name not in places]
        for name in places.keys() & self.headers.keys():
            found, expected = self.headers[name], shapes[places[name]]
            if found.shape != expected or not found.is_floating_point():
                wrong.append(f"has {name} of {tuple(found.shape)} in {found.dtype}, not {tuple(expected)}")
        if wrong:
            raise ValueError(
                f"adapter {self.source!r} is not one of this model: it {first_names(sorted(wrong))}; allowed: an "
                "adapter that was trained on this model, with the config that was saved with it"
            )

    @torch.no_grad()
    def load_into(self, adapted: PeftModel) -> None:
        """Give the adapters in `adapted` their values, in its dtype. Under ZeRO-3 a collective call."""
        import deepspeed

        places = _places(adapted)
        tensors = dict(adapted.named_parameters(remove_duplicate=False)) | dict(adapted.named_buffers())
        with StoredTensors((self.file,)) as stored:
            for name in sorted(self.names):
                tensor = tensors[places[name]]
                sharded = [tensor] if hasattr(tensor, "ds_id") else []
                with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0):
                    tensor.copy_(stored[self.names[name]])


def find_adapter(source: str, whole: WholeModel | None = None) -> SavedAdapter:
    """The trained adapter in a folder, or of a Hugging Face id, whose files it gets onto this machine.

    Args:
        whole: the multimodal model whose language model has it.

    Raises:
        ValueError: its config or its weights are missing, damaged or cannot be trained.
    """
    base = saved_config(source).base_model_name_or_path
    file = saved_weights(source)
    headers = read_headers(file)
    names = {name if whole is None else name_in_language(name, whole.places): name for name in headers}
    return SavedAdapter(source, base or None, file, {own: headers[name] for own, name in names.items()}, names)


def _places(adapted: PeftModel, *, with_embeddings: bool = True) -> dict[str, str]:
    """The names in a file of each tensor that peft saves of `adapted`, and those in the model.

    Args:
        with_embeddings: also of the embeddings and the LM head below adapters, which peft saves in some cases.
    """
    from peft import get_peft_model_state_dict

    state = adapted.state_dict()
    names = {id(tensor): name for name, tensor in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = get_peft_model_state_dict(adapted, state_dict=state, save_embedding_layers=with_embeddings)
    return {name: names[id(tensor)] for name, tensor in saved.items() if id(tensor) in names}
