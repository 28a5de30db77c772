"""The results of a sweep as pictures; predictions are dashed with hollow marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst_ds.config import GIB
from mst_ds.scaling.curves import Curve, strong_curves, weak_curves
from mst_ds.scaling.result import DONE, FAILED, OUT_OF_MEMORY, REFUSED, TIMED_OUT, Result
from mst_ds.scaling.sweep import short_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT, _LEGEND_LINE = 5.0, 3.6, 0.17  # in inches
_MARKERS = "osD^vP*X"
_TOLERATED = 0.1


def plot_results(results: Sequence[Result], folder: Path) -> list[Path]:
    """Writes a picture of each kind that there is something to show of, as PNG; returns their paths.

    Nothing is written where matplotlib, an optional extra, is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    drawn: list[tuple[str, Figure | None]] = [
        ("against_length", _against_length(results)),
        ("scaling", _scaling(strong_curves(results), weak_curves(results))),
        ("planned_against_measured", _planned_against_measured(results)),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in drawn:
        path = folder / f"{name}.png"
        if isinstance(figure, Figure):
            figure.savefig(path, dpi=150)
            paths.append(path)
    return paths


def _figure(
    columns: int, rows: int = 1, *, height: float = _HEIGHT, width: float = _WIDTH, **options: Any
) -> tuple[Figure, Any]:
    """Of so many axes, each of this size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + 0.6), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _against_length(results: Sequence[Result]) -> Figure | None:
    """A column for each number of nodes and ranks; above tokens/s, below memory; a colour for each sp size."""
    shown = [result for result in results if result.status != REFUSED]
    if not shown:
        return None
    worlds = sorted({(result.num_nodes, result.num_gpus) for result in shown})
    sp_sizes, variants = sorted({result.sp_size for result in shown}), sorted({result.variant for result in shown})
    figure, axes = _figure(len(worlds), 2, sharex=True, sharey="row")
    for column, world in enumerate(worlds):
        top, bottom = axes[:, column]
        of_world = [result for result in shown if (result.num_nodes, result.num_gpus) == world]
        top.set_title(f"{world[0]} node{'s' * (world[0] > 1)} × {world[1]} rank{'s' * (world[1] > 1)}")
        for source, variant, sp_size in sorted({(each.source, each.variant, each.sp_size) for each in of_world}):
            line = [
                result
                for result in of_world
                if (result.source, result.variant, result.sp_size) == (source, variant, sp_size)
            ]
            style = {
                "color": f"C{sp_sizes.index(sp_size) % 10}",
                "marker": _MARKERS[variants.index(variant) % len(_MARKERS)],
                **_style(line[0]),
            }
            label = f"sp {sp_size}, {variant}" + ("" if line[0].is_measured else f" ({source})")
            _line(top, line, [result.tokens_per_second for result in line], label, style)
            peaks = [None if result.peak_bytes is None else result.peak_bytes / GIB for result in line]
            _line(bottom, line, peaks, label, style)
            _failures(top, line, style["color"], 0.03 + 0.04 * sp_sizes.index(sp_size))
        _length_axis(bottom, sorted({result.seq_len for result in shown}))
    axes[0, 0].set_ylabel("tokens/s")
    axes[0, 0].yaxis.set_major_formatter("{x:,.0f}")
    axes[1, 0].set_ylabel("GiB of device memory at the peak")
    _finish(figure, axes)
    return figure


def _line(
    axes: Axes, line: Sequence[Result], values: Sequence[float | None], label: str, style: dict[str, Any]
) -> None:
    done = [(each.seq_len, value) for each, value in zip(line, values, strict=True) if each.status == DONE and value]
    if done:
        axes.plot([length for length, _ in done], [value for _, value in done], label=label, **style)


def _failures(axes: Axes, line: Sequence[Result], colour: str, height: float) -> None:
    """Marks above the lower edge, by this part of the axes. What no run can have is left out."""
    for statuses, mark, text in (((OUT_OF_MEMORY,), "x", OUT_OF_MEMORY), ((FAILED, TIMED_OUT), "+", "failed")):
        lengths = [result.seq_len for result in line if result.status in statuses]
        if lengths:
            style: dict[str, Any] = {"marker": mark, "linestyle": "none", "markersize": 7, "markeredgewidth": 2}
            # In x by the data, in y by the axes.
            transform = axes.get_xaxis_transform()
            axes.plot(lengths, [height] * len(lengths), transform=transform, color=colour, **style)
            axes.plot([], [], color="grey", label=text, **style)


def _style(result: Result) -> dict[str, Any]:
    return {} if result.is_measured else {"linestyle": "--", "markerfacecolor": "none"}


def _length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(lengths), [short_length(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens in a sequence")


def _scaling(strong: Sequence[Curve], weak: Sequence[Curve]) -> Figure | None:
    """A row for each variant; each axes with a legend of its own beside it."""
    groups = list(dict.fromkeys(curve.group for curve in [*strong, *weak]))
    if not groups:
        return None
    kinds = (("strong scaling", strong), ("weak scaling", weak))
    of_axes = [[[curve for curve in curves if curve.group == group] for _, curves in kinds] for group in groups]
    longest = max(len(curves) for row in of_axes for curves in row)
    figure, axes = _figure(2, len(groups), height=max(_HEIGHT, _LEGEND_LINE * longest + 1), width=_WIDTH + 1.5)
    for row, group in enumerate(groups):
        for column, (kind, _) in enumerate(kinds):
            axes[row, column].set_title(f"{kind}: {group}")
            _efficiencies(axes[row, column], of_axes[row][column])
    return figure


def _efficiencies(axes: Axes, curves: Sequence[Curve]) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"].resampled(max(2, len(curves)))
    for number, curve in enumerate(curves):
        axes.plot(
            [result.world_size for result in curve.results],
            [100 * efficiency for efficiency in curve.efficiencies],
            color=colours(number),
            marker=_MARKERS[number % len(_MARKERS)],
            label=curve.label,
            **_style(curve.results[0]),
        )
    if not curves:
        axes.set_axis_off()
        return
    sizes = sorted({result.world_size for curve in curves for result in curve.results})
    axes.axhline(100, color="grey", linewidth=1)
    axes.set_ylim(0, 108 * max(1.0, *(efficiency for curve in curves for efficiency in curve.efficiencies)))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("ranks")
    axes.set_ylabel("efficiency, % of the fewest ranks")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _planned_against_measured(results: Sequence[Result]) -> Figure | None:
    from matplotlib.ticker import LogLocator

    shown = [result for result in results if result.measured_peak_bytes and result.planned_peak_bytes]
    if not shown:
        return None
    figure, axes = _figure(1)
    place: Axes = axes[0, 0]
    for number, variant in enumerate(sorted({result.variant for result in shown})):
        pairs = [
            (each.planned_peak_bytes or 0, each.measured_peak_bytes or 0) for each in shown if each.variant == variant
        ]
        place.plot(
            [planned / GIB for planned, _ in pairs],
            [measured / GIB for _, measured in pairs],
            linestyle="none",
            color=f"C{number % 10}",
            marker=_MARKERS[number % len(_MARKERS)],
            label=variant,
        )
    every = [count / GIB for each in shown for count in (each.planned_peak_bytes or 0, each.measured_peak_bytes or 0)]
    ends = [min(every) / 1.3, max(every) * 1.3]
    place.plot(ends, ends, color="grey", linewidth=1, label="as planned")
    place.fill_between(
        ends,
        [end * (1 - _TOLERATED) for end in ends],
        [end * (1 + _TOLERATED) for end in ends],
        color="lightgrey",
        alpha=0.5,
        label="within a tenth",
    )
    place.set_xscale("log")
    place.set_yscale("log")
    for axis in (place.xaxis, place.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
    place.minorticks_off()
    place.grid(alpha=0.3)
    place.set_xlabel("planned GiB at the peak")
    place.set_ylabel("measured GiB at the peak")
    place.legend(fontsize="small")
    return figure


def _finish(figure: Figure, axes: Any) -> None:
    """One legend for all axes, and ticks of memory and rate from 0."""
    found: dict[str, Any] = {}
    for place in axes.flat:
        place.set_ylim(bottom=0)
        place.grid(alpha=0.3)
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, fontsize="small")
