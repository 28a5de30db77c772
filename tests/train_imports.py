"""Imports what a training run imports, once for many of them; see `trainings`."""

import conftest  # noqa: F401 - settings that must stand before torch is imported
import peft  # noqa: F401
