"""The flags that say which adapters are trained, and what becomes of them; without a library."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mst_ds.command_line.flags import flag, joined, words_in

ALL_LINEAR = "all-linear"
# As TRL's scripts have them.
LORA_ALPHA = 32
LORA_DROPOUT = 0.05
# No matrix of a model is larger; a larger factor has no use.
MOST_RANK = 2**20
MOST_ALPHA = 1e6
_OF_LORA = ("lora_alpha", "lora_dropout", "lora_target_modules")


@dataclass(frozen=True)
class AdapterRequest:
    """Which adapters are trained: those of a file of peft, LoRA by its numbers, or an adapter that was saved.

    Attributes:
        peft_config: an adapter_config.json, or its folder.
        adapter: folder or Hugging Face id of a trained adapter.
        lora_r, lora_alpha, lora_dropout: rank, scale and dropout of new LoRA adapters.
        lora_target_modules: names of modules with commas between them, or "all-linear".

    One of `peft_config`, `adapter` and `lora_r` is not None.
    """

    peft_config: str | None = None
    adapter: str | None = None
    lora_r: int | None = None
    lora_alpha: int = LORA_ALPHA
    lora_dropout: float = LORA_DROPOUT
    lora_target_modules: str = ALL_LINEAR

    @classmethod
    def of(cls, values: AdapterFlags) -> AdapterRequest | None:
        """Of flags; None where they ask for no adapters.

        Raises:
            ValueError: more than one of them says which adapters are trained.
        """
        names = ("peft_config", "adapter", "lora_r")
        asked = [name for name in names if getattr(values, name) is not None]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} each say which adapters are trained; allowed: one of them")
        return cls(*(getattr(values, name) for name in (*names, *_OF_LORA))) if asked else None


@dataclass
class AdapterFlags:
    """Flags of a training run and of a plan."""

    peft_config: str | None = flag(
        None,
        "adapter_config.json of peft, or its folder: trains new adapters, and not the model's own weights.",
        os.path.expanduser,
    )
    lora_r: int | None = flag(
        None, "Rank of new LoRA adapters: trains them, and not the model's own weights; needs no peft_config."
    )
    lora_alpha: int = flag(LORA_ALPHA, "LoRA adds its product times lora_alpha / lora_r.")
    lora_dropout: float = flag(LORA_DROPOUT, "Part of a LoRA adapter's inputs that is dropped in training.")
    lora_target_modules: str = flag(
        ALL_LINEAR, "Names of the modules with LoRA, such as q_proj v_proj; all-linear: all but the LM head.", nargs="+"
    )
    adapter: str | None = flag(
        None, "Folder or Hugging Face id of a trained adapter, which is trained on.", os.path.expanduser
    )
    merge_adapter: bool = flag(
        False, "The model that a run leaves is one with the adapters merged into its weights, not the adapters alone."
    )

    def __post_init__(self) -> None:
        self.lora_target_modules = joined(self.lora_target_modules)
        # Names of the flags that the user gave, in the file too. No field, because it is no flag.
        self.given: frozenset[str] = frozenset()

    @property
    def adapters(self) -> AdapterRequest | None:
        """What these flags ask for; None: the model itself is trained."""
        return AdapterRequest.of(self)

    def check_adapters(self) -> None:
        """Check these flags without the files that they name.

        Raises:
            ValueError: one line with what was given and what is allowed.
        """
        request = self.adapters
        if self.merge_adapter and request is None:
            raise ValueError(
                "merge_adapter is true, but no adapters are trained; allowed: --lora_r, --adapter or --peft_config too"
            )
        if self.lora_r is None:
            for name in _OF_LORA:
                if name in self.given:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, but no lora_r asks for LoRA; allowed: --lora_r too, or "
                        f"no --{name}"
                    )
            return
        checks = {
            "lora_r": (1 <= self.lora_r <= MOST_RANK, f"a whole number from 1 to {MOST_RANK}"),
            "lora_alpha": (1 <= self.lora_alpha <= MOST_ALPHA, f"a whole number from 1 to {MOST_ALPHA:.0f}"),
            "lora_dropout": (0 <= self.lora_dropout < 1, "a number from 0 up to, not including, 1"),
            "lora_target_modules": (bool(words_in(self.lora_target_modules)), "names of modules, or all-linear"),
        }
        for name, (is_allowed, allowed) in checks.items():
            if not is_allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")
