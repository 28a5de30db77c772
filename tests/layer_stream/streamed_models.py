"""Models under a plan, the batch that they are compared on, and what their layers keep."""

import copy

import pytest
from plain_model import make_batch
from tiny import tiny_settings

from mst_ds import apply_settings

# In 4 chunks of 2 rows a layer's input, and keys and values, are above the size from which tensors go to the host.
LENGTH = 64
BATCH = make_batch(LENGTH)
KEPT = [
    pytest.param({"keep_attention": keep, "keep_mlp": keep, "offload_activations": offload}, id=f"{keep=}-{offload=}")
    for keep in (False, True)
    for offload in (False, True)
]
NO_RECOMPUTE = {"recompute": False}


def patched(model, **settings):
    return apply_settings(copy.deepcopy(model), tiny_settings(**settings))
