"""Settings that must stand before torch, deepspeed or transformers are imported."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# DeepSpeed builds with the ninja that it finds first; another version than last time builds everything again.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills",
        type=int,
        default=0,
        help="of tests/test_kills.py: so many more, of runs drawn at random",
    )


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """This process as the only rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _the_next_test_finds_the_process_as_it_was() -> Iterator[None]:
    """The training command's main has signals wait, and writes where DeepSpeed looks that it is one process, which in
    this process would be so for every test after it, and for every run that such a test starts."""
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    environment = dict(os.environ)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, signals)
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)
