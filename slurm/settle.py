"""What a job adds to its user's flags: prints the output folder, then what to resume from, a line each."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mst_ds.config import AUTO
from mst_ds.config_parser import parse_train_config


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 2, and one line on stderr, for flags that launch/train.py would refuse."""
    try:
        output_dir = (
            parse_train_config([*argv, "--resume", "."]).output_dir or f"runs/slurm-{os.environ['SLURM_JOB_ID']}"
        )
        resume = parse_train_config([*argv, "--output_dir", output_dir]).resume
    except ValueError as error:
        print(f"train.sbatch: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    folder = Path(output_dir).expanduser()
    print(folder)
    # A job that comes back goes on from its own checkpoints, whatever its user had it begin from.
    print(AUTO if resume is None or _has_checkpoint(folder) else resume)
    return 0


def _has_checkpoint(output_dir: Path) -> bool:
    return any(re.fullmatch(r"step-\d+", path.name) for path in output_dir.glob("checkpoints/*"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
