"""Log-probabilities under the model that a run starts from: computed once, before the first step, and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mst_ds.data import EvalLoader, PackedDataset, TrainingData, to_device
from mst_ds.data.order import SampleOrder
from mst_ds.data.sharding import DOCUMENTS
from mst_ds.engine import Run
from mst_ds.files.whole_file import replace_file
from mst_ds.memory.out_of_memory import during
from mst_ds.objectives import Documents
from mst_ds.sequence_parallel import SequenceGroup
from mst_ds.training.loop import end_forwards

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_LOGPS, _FINGERPRINT = "logps", "fingerprint"


def reference_logps(
    engine: DeepSpeedEngine, run: Run, data: TrainingData, group: SequenceGroup | None, file: Path
) -> Tensor:
    """The log-probability of what is learned of each document that the run reads. A collective call.

    A run that goes on takes from `file` what its earlier part has left, where it is of the same data and model. Another
    run reads nothing: the weights in the model's folder may have been others when the file was written.

    Args:
        engine: has the weights that the run starts from.
        group: the ranks that share this rank's sequences.

    Returns:
        (documents of the dataset,) fp64, on the engine's device; NaN for those that the run does not read.

    Raises:
        OSError: the file cannot be written.
    """
    fingerprint = _fingerprint(run, data)
    known = torch.full((data.num_documents,), torch.nan, dtype=torch.float64)
    if run.launch.rank == 0 and run.checkpoint is not None:
        known = _read(file, fingerprint, known)
    known = known.to(engine.device)
    dist.broadcast(known, 0)
    datasets = [data.train.only(_samples_read(run, data.train)), *([data.held_out] if data.held_out else [])]
    missing = [each.only(_samples_without(each, known.isfinite().cpu().numpy())) for each in datasets]
    if not any(map(len, missing)):
        return known
    if run.launch.rank == 0:
        print(
            f"reference: {sum(map(len, missing)):,} samples go through the model that the run starts from", flush=True
        )
    for dataset in missing:
        found = _logps(engine, run, dataset, group, data.num_documents)
        known = torch.where(found.isfinite(), found, known)
    if run.launch.rank == 0:
        replace_file(file, save({_LOGPS: known.cpu()}, {_FINGERPRINT: fingerprint}))
    return known


def _fingerprint(run: Run, data: TrainingData) -> str:
    """Of all that decides a log-probability, but for the files of the weights, which are the run's own."""
    config = run.config
    of_data = [data.fingerprint, config.seq_len, config.too_long]
    parts = [asdict(run.identity), config.model, config.adapter, *of_data]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(file: Path, fingerprint: str, unknown: Tensor) -> Tensor:
    """What is in the file; `unknown` where it is none, or of something else."""
    try:
        with safe_open(file, "pt") as saved:
            if (saved.metadata() or {}).get(_FINGERPRINT) == fingerprint:
                found: Tensor = saved.get_tensor(_LOGPS)
                return found if found.shape == unknown.shape and found.dtype == unknown.dtype else unknown
    except (OSError, SafetensorError):
        pass
    return unknown


def _samples_read(run: Run, train: PackedDataset) -> Iterable[int]:
    """The numbers of the samples that are still to be trained on."""
    per_step = run.plan.samples_per_step
    positions = range(run.steps_done * per_step, run.config.max_steps * per_step)
    # Within two epochs each is met.
    if len(positions) >= 2 * len(train):
        return range(len(train))
    order = SampleOrder(len(train), run.config.seed)
    return sorted({order[position] for position in positions})


def _samples_without(dataset: PackedDataset, is_known: NDArray[np.bool_]) -> list[int]:
    return [number for number in range(len(dataset)) if not is_known[dataset.documents_in(number)].all()]


@torch.no_grad()
def _logps(
    engine: DeepSpeedEngine, run: Run, dataset: PackedDataset, group: SequenceGroup | None, num_documents: int
) -> Tensor:
    """Of each document of the samples; NaN of others. Every rank computes its share, and gets all."""
    topology, device = run.plan.topology, engine.device
    sums = torch.zeros((2, num_documents), dtype=torch.float64, device=device)
    batches = EvalLoader(
        dataset,
        topology,
        micro_batch_size=run.plan.micro_batch_size,
        layer_chunks=run.plan.settings.layer_chunks,
    )
    engine.eval()
    for batch in batches:
        inputs = to_device(batch, device)
        documents = inputs.pop(DOCUMENTS)
        with during("forward", "loss"):
            log_probs = engine(**inputs, return_log_probs=True).log_probs
        found = Documents.of_batch(inputs, group).sums(log_probs)
        # All ranks of a sequence have the same sums.
        if topology.sp_rank == 0:
            sums[0, documents], sums[1, documents] = found, 1.0
    end_forwards(engine)
    dist.all_reduce(sums)
    return sums[0].masked_fill(sums[1] == 0, torch.nan)
