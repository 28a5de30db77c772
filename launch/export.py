"""The command `mst-export` as a file; see `mst_ds.commands.export`."""

import sys

from mst_ds.commands.export import cli

if __name__ == "__main__":
    sys.exit(cli())
