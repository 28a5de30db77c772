"""The command `mst-scale` as a file; see `mst_ds.commands.scale`."""

import sys

from mst_ds.commands.scale import cli

if __name__ == "__main__":
    sys.exit(cli())
