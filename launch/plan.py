"""The command `mst-plan` as a file; see `mst_ds.commands.plan`."""

import sys

from mst_ds.commands.plan import cli

if __name__ == "__main__":
    sys.exit(cli())
