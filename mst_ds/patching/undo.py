"""What a plan has changed in an instance, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.utils.hooks import RemovableHandle


class UNSET:
    """Stands for the old value of an attribute that an instance did not have; a deepcopy leaves a class as it is."""


@dataclass
class Undo:
    """The instance attributes that were changed, with their old values; data only, so that a model can be copied."""

    changes: list[tuple[Any, str, Any]] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)

    def set_attribute(self, module: Any, name: str, value: Any) -> None:
        """Set an instance attribute so that the undo restores the old one, or uncovers the class's."""
        self.changes.append((module, name, module.__dict__.get(name, UNSET)))
        module.__dict__[name] = value

    def run(self) -> None:
        """Put back what was there before, the last change first."""
        for hook in self.hooks:
            hook.remove()
        for module, name, old in reversed(self.changes):
            if old is UNSET:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = old
