"""Imports what a training run imports, once for many of them; see `trainings`."""

import conftest  # noqa: F401 - settings that must stand before torch is imported
import peft  # noqa: F401

import mst_ds.data
import mst_ds.engine
import mst_ds.export
import mst_ds.failure
import mst_ds.loop
import mst_ds.saver
import mst_ds.watchdog  # noqa: F401
