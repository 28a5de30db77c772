"""Measures on one GPU, within minutes, all that is claimed of one: python benchmarks/gpu_session.py --help"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    # The project that this file is a part of, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    # Before torch is imported: long steps leave gaps in segments of fixed sizes.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from benchmarks.gpu.session import main as run_session

    run_session()


if __name__ == "__main__":
    main()
