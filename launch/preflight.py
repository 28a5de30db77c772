"""The command `mst-preflight` as a file; see `mst_ds.commands.preflight`."""

import sys

from mst_ds.commands.preflight import cli

if __name__ == "__main__":
    sys.exit(cli())
