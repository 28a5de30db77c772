"""A rank's random generators: Python's, NumPy's, torch's and its device's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_file(rank: int) -> str:
    return f"random_states_rank_{rank}.pt"


def random_states(device: torch.device) -> dict[str, Any]:
    """In numbers, text and tensors only, which are read without running code."""
    name, keys, *rest = np.random.get_state(legacy=True)
    numpy_states = (name, np.asarray(keys).tolist(), *rest)
    states = {"python": random.getstate(), "numpy": numpy_states, "torch": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"], device)


def seed_generators(seed: int, step: int, rank: int) -> None:
    """Where no states were kept: numbers that no other step and no other rank has."""
    own = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)
