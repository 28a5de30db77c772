"""Writes docs/benchmarks.md and its plots from benchmarks/results: python -m benchmarks.write_report"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.session import SECTIONS
from benchmarks.report import RESULTS
from benchmarks.tokenising import lines
from mst_ds.config import GIB

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
_PARTS = {"step": "Whole step", "layers": "Layers alone, without embedding, head and loss"}
_REFERENCES = ("recompute", "DeepSpeed ALST")
_HEAD = """# Benchmarks

Written by `python -m benchmarks.write_report` from `benchmarks/results/`, which `make bench` fills.

```bash
make bench ARGS="--lengths 512 4096"
```

runs a training step of ordinary recompute, per-chunk checkpoint, DeepSpeed ALST and this project, in turns, on the same
weights and data. It compares their gradients first, then prints time, peak memory and FLOPs of each, and writes this
page. `python -m benchmarks.step --help` lists sizes, for a GPU too, and `--longest` finds the longest sequence that
each can train on. DeepSpeed ALST stands for its tiled MLP and tiled loss in recomputed layers, on one rank. "mst_ds, as
StreamBP" is a setting of this project that does what StreamBP does, attention again and keys and values projected
again in each layer chunk; it is not StreamBP's code. `python -m benchmarks.working_set` needs no memory: it finds what
one layer's backward takes. `python -m benchmarks.tokenising` measures the data's part.

Contenders run interleaved in one process, on the same weights and data, after their gradients were compared. Ratios are
medians of the ratio within a round. Memory is what is alive at the peak above the weights: gradients and activations;
on a CPU without what was put on the host on purpose. Attention forwards are calls of a kernel: a layer in n chunks has
2n - 1, which compute together what one does.

[On a GPU](gpu.md) one script measures all of this, and more, in ten minutes.
"""


def page(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """The page in Markdown; documents are the results by the name of their file."""
    sections = [_HEAD]
    for name, document in documents.items():
        where = document["where"]
        sections.append(
            f"## {name}\n\n{where['device']}, {where['threads']} thread(s), torch {where['torch']}, transformers "
            f"{where['transformers']}, DeepSpeed {where['deepspeed']}, commit `{where['commit'][:12]}`.\n"
        )
        if "sections" in document:
            sections.append(_session_table(document["sections"]))
            continue
        if "tokenising" in document:
            sections.append("".join(f"- {line}\n" for line in lines(document["tokenising"])))
            continue
        if "longest" in document:
            sections.append(_longest_table(document["longest"]))
            continue
        for part, title in _PARTS.items():
            records = [record for record in document["records"] if record["part"] == part]
            if records:
                sections.append(f"### {title}\n\n![memory and time](benchmarks/{name}-{part}.svg)\n")
                sections.extend(_record_table(record) for record in records)
    return "\n".join(sections)


def plot(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Memory and time against length, a line a contender."""
    import matplotlib as mpl

    mpl.use("Agg")
    # Names inside an SVG follow from this; else each picture would differ from the one before.
    mpl.rcParams["svg.hashsalt"] = "mst_ds"
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for record in records:
        for result in record["results"]:
            point = record["seq_len"], result["peak_bytes"] / GIB, statistics.median(result["seconds"])
            lines.setdefault(result["contender"], []).append(point)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for index, (axis, label) in enumerate(zip(axes, ("peak GiB", "seconds"), strict=True), start=1):
        for name, points in lines.items():
            axis.plot([point[0] for point in points], [point[index] for point in points], marker="o", label=name)
        axis.set(yscale="log", xlabel="tokens", ylabel=label)
        axis.set_xscale("log", base=2)
    axes[1].legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _record_table(record: Mapping[str, Any]) -> str:
    results = {result["contender"]: result for result in record["results"]}
    references = [name for name in _REFERENCES if name in results]
    headings = ["contender", "seconds", *(f"time / {name}" for name in references), "tokens/s", "peak GiB"]
    headings += ["matrix GFLOP", "attention GFLOP", "attention forwards"]
    rows = [_row(headings), _row(["---"] * len(headings))]
    for name, result in results.items():
        seconds = statistics.median(result["seconds"])
        ratios = (_median_ratio(result, results[reference]) for reference in references)
        counts = result["counts"]
        cells = [name, f"{seconds:.3f}", *(f"{ratio:.2f}" for ratio in ratios)]
        cells += [f"{record['seq_len'] / seconds:.0f}", f"{result['peak_bytes'] / GIB:.3f}"]
        cells += [
            f"{counts['matrix'] / 1e9:.0f}",
            f"{counts['attention'] / 1e9:.0f}",
            f"{counts['attention_forwards']}",
        ]
        rows.append(_row(cells))
    table = f"{record['seq_len']} tokens, {record['chunks']} chunk(s):\n\n" + "\n".join(rows) + "\n"
    return table + "".join(f"\nOut of memory: {name}.\n" for name in record["out_of_memory"])


def _median_ratio(result: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    return statistics.median(a / b for a, b in zip(result["seconds"], reference["seconds"], strict=True))


def _longest_table(lengths: Mapping[str, int]) -> str:
    rows = [_row([name, f"{tokens}"]) for name, tokens in lengths.items()]
    return "\n".join([_row(["contender", "longest sequence, tokens"]), _row(["---"] * 2), *rows]) + "\n"


def _session_table(outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [_row(["section", "status", "what was found"]), _row(["---"] * 3)]
    for section in SECTIONS:
        if section.name in outcomes:
            outcome = outcomes[section.name]
            rows.append(_row([section.name, outcome["status"], "<br>".join(section.lines(outcome["results"]))]))
    return "\n".join(rows) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    documents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    for name, document in documents.items():
        for part in _PARTS:
            records = [record for record in document.get("records", ()) if record["part"] == part]
            if records:
                plot(records, PAGE.parent / "benchmarks" / f"{name}-{part}.svg")
    PAGE.write_text(page(documents), encoding="utf-8")


if __name__ == "__main__":
    main()
