from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster


@pytest.fixture(scope="session", autouse=True)
def _slurm_is_installed() -> None:
    if shutil.which("sbatch") is None or shutil.which("munge") is None:
        pytest.fail("no SLURM here: apt-get install slurm-wlm munge, then make test-slurm", pytrace=False)


@pytest.fixture
def cluster_folder() -> Iterator[Path]:
    """Not one of pytest's: the path of a socket has to be short."""
    folder = Path(tempfile.mkdtemp(prefix="mst_ds-slurm-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="mst_ds-slurm-", dir="/tmp"))
    running = Cluster.start(folder)
    yield running
    running.stop()
