"""What a run is: what must be the same for it to go on from a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# Fields of a config that say nothing about what is computed.
_NO_PART_OF_A_MODEL = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})


@dataclass(frozen=True)
class Identity:
    """What must be the same for a run to go on: other sizes of the world, devices or chunk counts are not in it.

    tokenizer: a digest of its vocabulary. peft: the config of the adapters, None without. training: by name, the
    settings whose values a checkpoint holds, so that other ones would be without effect.
    """

    model: dict[str, Any]
    peft: dict[str, Any] | None
    tokenizer: str
    dtype: str
    zero_stage: int
    training: dict[str, Any]

    @classmethod
    def of(
        cls,
        model_config: PreTrainedConfig,
        peft_config: PeftConfig | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str,
        zero_stage: int,
        training: Mapping[str, Any],
    ) -> Identity:
        model = {key: value for key, value in model_config.to_dict().items() if key not in _NO_PART_OF_A_MODEL}
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
        return cls(
            model=_as_json(model),
            peft=None if peft_config is None else _as_json(peft_config.to_dict()),
            tokenizer=hashlib.sha256(vocabulary).hexdigest(),
            dtype=dtype,
            zero_stage=zero_stage,
            training=_as_json(training),
        )

    def require_same(self, saved: Identity, folder: Path) -> None:
        """Refuse to go on from `folder`.

        Raises:
            ValueError: with the first thing that differs.
        """
        here, there = (_flat(asdict(identity)) for identity in (self, saved))
        differing = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        if differing == ["tokenizer"]:
            raise ValueError(
                f"the checkpoint {folder} was made with another tokenizer; allowed: the same, or another output_dir"
            )
        if differing:
            name = differing[0]
            raise ValueError(
                f"the checkpoint {folder} was made with {name} {there.get(name)!r}, but this run has "
                f"{here.get(name)!r}; allowed: the same, or another output_dir"
            )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of fields, of any depth, as "model.rope_parameters.factor"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value) if isinstance(value, dict) else {}
        flat |= {f"{key}.{name}": each for name, each in inner.items()} or {key: value}
    return flat


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As it is when it has been written and read; sets, which peft's configs have, in order."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, (set, frozenset)) else str(value)

    fields: dict[str, Any] = json.loads(json.dumps(dict(values), default=plain, sort_keys=True))
    return fields
