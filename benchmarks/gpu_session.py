"""Measures on one GPU, within minutes, all that is claimed of one: python benchmarks/gpu_session.py --help"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    # The project that this file is a part of, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from mst_ds.commands.train import settle_environment

    # Before torch is imported, and as a run does.
    settle_environment(os.environ)
    from benchmarks.gpu.session import main as run_session

    run_session()


if __name__ == "__main__":
    main()
