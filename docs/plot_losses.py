"""Draws the losses of a run: python docs/plot_losses.py runs/own/metrics.jsonl losses.svg"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def plot(metrics: Path, picture: Path) -> None:
    """Training and evaluation loss against the step; the picture's suffix says its format."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "mst_ds"  # else each picture would differ from the one before
    from matplotlib import pyplot

    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, axis = pyplot.subplots(figsize=(7, 3), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(record["step"], record[key]) for record in records if key in record]
        axis.plot([step for step, _ in points], [loss for _, loss in points], style, label=label)
    axis.set(xlabel="step", ylabel="loss")
    axis.legend()
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


if __name__ == "__main__":
    plot(*map(Path, sys.argv[1:]))
