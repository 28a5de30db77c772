"""What a preflight compares: settings that stand for those of a run, and what packs or pads its documents."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mst_ds.config import AUTO
from mst_ds.geometry import LEAST_CHUNK_TOKENS
from mst_ds.settings import KNOBS, MstConfig, Settings
from mst_ds.token_layout import TokenLayout


@dataclass(frozen=True)
class Case:
    """What decides what is computed: the settings, and whether documents are packed or padded."""

    settings: Settings
    packed: bool

    def __str__(self) -> str:
        return f"{self.settings}, {'packed' if self.packed else 'padded'}"

    def min_tokens(self) -> int:
        """The fewest tokens of a rank that make as many chunks as asked for; within each chunk of a layer, where there
        are several, as many of the MLP as stand for any number."""
        settings = self.settings
        of_layers = settings.layer_chunks * min(settings.mlp_chunks, KNOBS["mlp_chunks"].several)
        return LEAST_CHUNK_TOKENS * max(of_layers, settings.mlp_chunks, settings.loss_chunks)

    def with_whole_layers(self) -> Case:
        """This of a model whose layers are one chunk whatever the settings say."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, layer_chunks=1))

    @property
    def token_layout(self) -> TokenLayout:
        """Which tokens a rank holds."""
        return TokenLayout(self.settings.sp_size, self.settings.layer_chunks)


def case_of_run(settings: Settings, *, packed: bool) -> Case:
    """What stands for a run with these settings, as small as it can be, with transformers' kernel."""
    several = {name: min(getattr(settings, name), knob.several) for name, knob in KNOBS.items() if knob.several}
    return Case(dataclasses.replace(settings, **several, attention="sdpa"), packed)


def cases_to_try(mst: MstConfig, *, packed: bool) -> list[Case]:
    """One rank and two, few chunks and many, without recompute and with; what the "mst" block rules out is left out."""
    columns = {name: knob.tried for name, knob in KNOBS.items() if knob.tried}
    ranks = columns.pop("sp_size")
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    cases = [Case(_settings(mst, {"sp_size": sp_size, **values}), packed) for sp_size in ranks for values in rows]
    return list(dict.fromkeys(cases))


def _settings(mst: MstConfig, tried: dict[str, Any]) -> Settings:
    """The values to try, but for what the user settled."""
    values = {name: _value(mst.get(name), value) for name, value in tried.items()}
    of_recompute = [name for name, knob in KNOBS.items() if knob.needs_recompute]
    values["recompute"] |= any(mst.get(name) not in (AUTO, KNOBS[name].off) for name in of_recompute)
    values |= {name: values[name] if values["recompute"] else KNOBS[name].off for name in of_recompute}
    if values["sp_size"] == 1:
        values |= {name: 1 for name, knob in KNOBS.items() if knob.needs_sharding}
    return Settings(**values)


def _value(asked: Any, tried: Any) -> Any:
    """Of numbers the small ones that are tried stand for any above 1."""
    if asked == AUTO or (not isinstance(asked, bool) and asked > 1):
        return tried
    return asked
