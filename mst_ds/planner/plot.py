"""A plan as a picture: the memory of each phase on the device and on the host, beside what is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst_ds.config import GIB
from mst_ds.planner.types import MemoryTerm, Phase, Place, Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMED = 5  # activations that have a colour of their own, of a device or a host
_STATES, _OTHERS = "states: parameters, gradients, optimizer", "other activations"
# Of kinds that are shown as one, bottom up.
_GROUPS: Mapping[str, str] = {"state": _STATES, "reserve": "reserve and rounding", "workspace": "kernels' workspace"}
_COLOURS: Mapping[str, str] = {
    _STATES: "#4c72b0",
    "reserve and rounding": "#b0b0b0",
    "kernels' workspace": "#937860",
    _OTHERS: "#e0e0e0",
}
_OF_ACTIVATIONS = ("#dd8452", "#55a868", "#c44e52", "#8172b3", "#ccb974", "#64b5cd", "#da8bc3", "#8c8c8c", "#2f7f7f")
# A bar's part that is lower than this part of the picture has no room for its number.
_LEAST_LABELLED = 0.035


def plot_plan(plan: Plan, path: Path, *, model: str = "", gpu: str | None = None) -> None:
    """Writes stacked bars of what is on the device and on the host of a rank, in GiB, with what is there as a line.

    Args:
        path: its suffix, such as .png or .svg, says in which format.
        model, gpu: their names, for the title.

    Raises:
        ValueError: matplotlib is not installed, it cannot write such a format, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a plot needs matplotlib, which is not installed: pip install 'mst_ds[plots]'") from None
    places: list[tuple[Place, int | None]] = [("device", plan.device_memory)]
    if plan.host_bytes:
        places.append(("host", plan.host_memory))
    figure = Figure(figsize=(6 + 4.5 * len(places), 6.5), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    # To a name without a suffix matplotlib would add one, and write another file than the user names.
    if path.suffix[1:].lower() not in formats:
        raise ValueError(
            f"plot is {str(path)!r}; allowed: a file with one of the suffixes .{', .'.join(sorted(formats))}"
        )
    figure.suptitle(_title(plan, model, gpu), fontsize=13)
    colours = _colours(plan, [place for place, _ in places])
    for axes, (place, there) in zip(figure.subplots(1, len(places), squeeze=False)[0], places, strict=True):
        _draw(axes, plan.phases, place, there, colours)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    order = [name for name in colours if name in handles]
    figure.legend(
        [handles[name] for name in order],
        [name.replace("_", " ") for name in order],
        loc="outside lower center",
        ncols=4,
    )
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ValueError(f"plot {str(path)!r} cannot be written: {error.strerror}") from None


def _title(plan: Plan, model: str, gpu: str | None) -> str:
    ranks = f"{plan.topology.world_size} x {gpu}" if gpu else f"{plan.topology.world_size} ranks"
    name = f"{model}: " if model else ""
    settings = f"sp_size {plan.sp_size}, ZeRO-{plan.zero_stage}, layer_chunks {plan.settings.layer_chunks}"
    verdict = "fits" if plan.fits else "does NOT fit"
    return f"{name}{plan.seq_len:,} tokens on {ranks}, {settings}: {verdict}"


def _draw(axes: Axes, phases: Sequence[Phase], place: Place, there: int | None, colours: Mapping[str, str]) -> None:
    names = [phase.name.replace("_", "\n") for phase in phases]
    bars = [_bar(phase, place, colours) for phase in phases]
    totals = [sum(bar.values()) for bar in bars]
    top = 1.12 * max(*totals, (there or 0) / GIB)
    bottoms = [0.0] * len(bars)
    for group, colour in colours.items():
        heights = [bar.get(group, 0.0) for bar in bars]
        if not any(heights):
            continue
        drawn: Any = axes.bar(names, heights, bottom=bottoms, label=group, color=colour, edgecolor="white", width=0.72)
        labels = [f"{height:.1f}" if height > _LEAST_LABELLED * top else "" for height in heights]
        axes.bar_label(drawn, labels, label_type="center", fontsize=8)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for index, total in enumerate(totals):
        axes.text(index, total + top / 150, f"{total:.1f}", ha="center", va="bottom", fontweight="bold", fontsize=10)
    title = f"{place} of a rank"
    if there is None:
        title += ", whose memory is not known"
    else:
        axes.axhline(there / GIB, color="black", linestyle="--", linewidth=1.2)
        title += f": {max(totals):.1f} of {there / GIB:.1f} GiB"
        axes.text(-0.45, there / GIB, f"{there / GIB:.1f} GiB there", ha="left", va="bottom", fontsize=9)
    axes.set_title(title, fontsize=11)
    axes.set_ylabel("GiB")
    axes.set_ylim(0, top)
    axes.spines[["top", "right"]].set_visible(False)


def _bar(phase: Phase, place: Place, colours: Mapping[str, str]) -> dict[str, float]:
    """GiB of each group."""
    bar: dict[str, float] = {}
    for term in phase.terms:
        if term.place == place:
            name = _GROUPS.get(term.kind, term.name)
            group = name if name in colours else _OTHERS
            bar[group] = bar.get(group, 0.0) + term.bytes / GIB
    return bar


def _colours(plan: Plan, places: Sequence[Place]) -> dict[str, str]:
    """By what is drawn, bottom up: kinds, the largest activations of each place, and all others."""
    largest = [name for place in places for name in _largest(plan.phases, place)]
    named = dict(zip(dict.fromkeys(largest), _OF_ACTIVATIONS * 2, strict=False))
    groups = {group: _COLOURS[group] for group in _GROUPS.values()}
    return {**groups, **named, _OTHERS: _COLOURS[_OTHERS]}


def _largest(phases: Sequence[Phase], place: Place) -> list[str]:
    found: dict[str, int] = {}
    for phase in phases:
        of_phase: dict[str, int] = {}
        for term in filter(_is_activation, phase.terms):
            if term.place == place:
                of_phase[term.name] = of_phase.get(term.name, 0) + term.bytes
        for name, count in of_phase.items():
            found[name] = max(found.get(name, 0), count)
    return sorted(found, key=lambda name: (-found[name], name))[:_NAMED]


def _is_activation(term: MemoryTerm) -> bool:
    return term.kind not in _GROUPS
