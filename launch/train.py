"""The training command as a file, which `deepspeed` starts on each rank; see `mst_ds.commands.train`."""

import sys

from mst_ds.commands.train import cli

if __name__ == "__main__":
    sys.exit(cli())
