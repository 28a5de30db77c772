"""Settings that must stand before torch, deepspeed or transformers are imported."""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# DeepSpeed builds with the ninja that it finds first; another version than last time builds everything again.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

import torch

torch.set_num_threads(1)
