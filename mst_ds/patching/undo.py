"""What a plan has changed in an instance, and the way back."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch.utils.hooks import RemovableHandle


class UNSET:
    """Stands for the old value of an attribute that an instance did not have; a deepcopy leaves a class as it is."""


@dataclass
class Undo:
    """The instance attributes that were changed, with their old values; data only, so that a model can be copied.

    Attributes:
        changes: module, name, and the value before.
        configs: what was copied, the copy, and its attributes when it was made.
        hooks: that were added.
        outermost: modules that others may wrap, with the forwards that they were given.
    """

    changes: list[tuple[Any, str, Any]] = field(default_factory=list)
    configs: list[tuple[Any, Any, dict[str, Any]]] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)
    outermost: list[tuple[Any, Any]] = field(default_factory=list)

    def set_attribute(self, module: Any, name: str, value: Any) -> None:
        """Set an instance attribute so that the undo restores the old one, or uncovers the class's."""
        self.changes.append((module, name, module.__dict__.get(name, UNSET)))
        module.__dict__[name] = value

    def copy_config(self, config: Any) -> Any:
        """A copy of `config` for this instance. What the user changes in it later is carried over by the undo."""
        own = copy.copy(config)
        self.configs.append((config, own, dict(own.__dict__)))
        return own

    def run(self) -> None:
        """Put back what was there before, the last change first."""
        for config, own, copied in self.configs:
            changed = {name: value for name, value in own.__dict__.items() if copied.get(name, UNSET) is not value}
            changed.pop("_attn_implementation_internal", None)
            config.__dict__.update(changed)
        for hook in self.hooks:
            hook.remove()
        for module, name, old in reversed(self.changes):
            if old is UNSET:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = old
