"""A plan as a picture: the memory of each phase on the device and on the host, beside what is there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst_ds.config import GIB
from mst_ds.planner.types import MemoryTerm, Phase, Place, Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What is shown as one, bottom up: kinds of terms, then activations by a part of their names, in which the first that is
# found decides; hidden states of layers, norms and residuals have no name of their own.
_KINDS: Mapping[str, str] = {
    "state": "states: parameters, gradients, optimizer",
    "reserve": "reserve and rounding",
    "workspace": "kernels' workspace",
}
_PARTS: Mapping[str, str] = {
    "kept for the backward": r"layer_inputs|kept_",
    "LM head and loss": r"loss_|final_norm|hidden_gradient|head_gradient",
    "gradients of a layer's weights": r"weight_gradients",
    "MLPs": r"mlp|expert",
    "attention": r"attention|query|key|gathered|kernel|merged|block|window|head|log_sum_exp|all_to_all|rotary|shared",
}
_HIDDEN = "hidden states and norms"
_COLOURS = ("#4c72b0", "#b0b0b0", "#937860", "#64b5cd", "#dd8452", "#8172b3", "#55a868", "#ccb974", "#da8bc3")
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
    colours = dict(zip((*_KINDS.values(), *_PARTS, _HIDDEN), _COLOURS, strict=True))
    for axes, (place, there) in zip(figure.subplots(1, len(places), squeeze=False)[0], places, strict=True):
        _draw(axes, plan.phases, place, there, colours)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    order = [name for name in colours if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside lower center", ncols=2 + len(places))
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
    bars = [_bar(phase, place) for phase in phases]
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


def _bar(phase: Phase, place: Place) -> dict[str, float]:
    """GiB of each group."""
    bar: dict[str, float] = {}
    for term in phase.terms:
        if term.place == place:
            bar[_group(term)] = bar.get(_group(term), 0.0) + term.bytes / GIB
    return bar


def _group(term: MemoryTerm) -> str:
    if term.kind in _KINDS:
        return _KINDS[term.kind]
    return next((group for group, words in _PARTS.items() if re.search(words, term.name)), _HIDDEN)
