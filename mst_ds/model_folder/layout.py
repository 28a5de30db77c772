"""What a model is made of: compared, so that the model that trains is the one that was checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_MOST_NAMES = 3


@dataclass(frozen=True)
class ModelLayout:
    """The modules of a model, by name and class, and its parameters and buffers, by name and shape."""

    parts: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> ModelLayout:
        """Of a model anywhere, sharded by ZeRO-3 too. Tied parameters count once."""
        parts = {f"module {name}": type(module).__name__ for name, module in model.named_modules()}
        for name, parameter in model.named_parameters():
            # Sharded, a parameter has no elements, and its shape beside it.
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            kind = "floating point" if parameter.is_floating_point() else str(parameter.dtype)
            parts[f"parameter {name}"] = f"{shape} in {kind}"
        parts |= {f"buffer {name}": str(tuple(buffer.shape)) for name, buffer in model.named_buffers()}
        return cls(parts)

    def require_same(self, loaded: ModelLayout) -> None:
        """Refuse a loaded model that is not made as the one that plan and preflight were for, which is this one.

        Raises:
            ValueError: modules, parameters or buffers differ; the text says which.
        """
        names = [*self.parts, *(name for name in loaded.parts if name not in self.parts)]
        differing = [
            f"{name} is {loaded.parts.get(name, 'not there')}, not {self.parts.get(name, 'there by the config')}"
            for name in names
            if self.parts.get(name) != loaded.parts.get(name)
        ]
        if differing:
            more = f" and {len(differing) - _MOST_NAMES} more" if len(differing) > _MOST_NAMES else ""
            raise ValueError(
                f"the model that was loaded is not the one that its config describes and that was checked: "
                f"{'; '.join(differing[:_MOST_NAMES])}{more}; allowed: weights and config of one model"
            )
