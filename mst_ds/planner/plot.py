"""A plan as a picture: the memory of each phase, a bar of its terms."""

from __future__ import annotations

from pathlib import Path

from mst_ds.config import GIB
from mst_ds.planner.types import Plan

_NAMED_TERMS = 9  # matplotlib has ten colours, one of them a grey
_OTHERS = "others"


def plot_plan(plan: Plan, path: Path) -> None:
    """Writes stacked bars of what is on the device, in GiB, with the device's memory as a line.

    Args:
        path: its suffix, such as .png or .svg, says in which format.

    Raises:
        ValueError: matplotlib is not installed, it cannot write such a format, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a plot needs matplotlib, which is not installed: pip install 'mst_ds[plots]'") from None
    figure = Figure(figsize=(10, 5), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    # To a name without a suffix matplotlib would add one, and write another file than the user names.
    if path.suffix[1:].lower() not in formats:
        raise ValueError(
            f"plot is {str(path)!r}; allowed: a file with one of the suffixes .{', .'.join(sorted(formats))}"
        )
    phases = [{term.name: term.bytes for term in phase.terms if term.place == "device"} for phase in plan.phases]
    names = [phase.name for phase in plan.phases]
    axes = figure.subplots()
    bottoms = [0.0] * len(phases)
    largest = _largest_terms(phases)
    for term in [*largest, _OTHERS]:
        of_bar = [{term}.intersection(phase) if term in largest else phase.keys() - set(largest) for phase in phases]
        heights = [sum(phase[name] for name in bar) / GIB for phase, bar in zip(phases, of_bar, strict=True)]
        axes.bar(names, heights, bottom=bottoms, label=term, color="lightgrey" if term == _OTHERS else None)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.axhline(plan.device_memory / GIB, color="black", linestyle="--", label="device memory")
    axes.set_ylabel("GiB on the device")
    axes.set_title(f"{plan.seq_len} tokens on {plan.topology.world_size} ranks, sp {plan.sp_size}")
    figure.legend(loc="outside right upper")
    try:
        figure.savefig(path)
    except OSError as error:
        raise ValueError(f"plot {str(path)!r} cannot be written: {error.strerror}") from None


def _largest_terms(phases: list[dict[str, int]]) -> list[str]:
    names = {name for phase in phases for name in phase}
    return sorted(names, key=lambda name: (-max(phase.get(name, 0) for phase in phases), name))[:_NAMED_TERMS]
