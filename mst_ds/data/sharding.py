"""From samples of full length to this rank's shard of them."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from mst_ds.config import IGNORE_INDEX
from mst_ds.document_table import document_table
from mst_ds.rows.kinds import OLD_LOGPS
from mst_ds.token_layout import TokenLayout
from mst_ds.topology import Topology

Batch: TypeAlias = dict[str, Tensor]
# Of a shard's tensors those that the host reads.
ON_HOST = frozenset({"document_table"})
DOCUMENTS = "documents"
"""Of a batch the numbers of its documents among those of the dataset, in their order; a model does not take it."""


def shift_labels(labels: Tensor) -> Tensor:
    """The label of each position is the next token; the last has none.

    (B, S) -> (B, S), or (S,) -> (S,). S must be the full length: the label of a shard's last position is the
    first token of the next shard.
    """
    return pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def shard(batch: Batch, topology: Topology, pad_id: int = 0, *, layer_chunks: int = 1) -> Batch:
    """This rank's part of a batch that every rank of its sequence group holds in full: nothing is exchanged.

    Where S is no multiple of sp_size the sequence is padded on the right.

    Args:
        batch: {"input_ids", "labels"[, "position_ids"][, "attention_mask"]}: (B, S) int64, the labels not shifted;
            [, "old_logps"] (B, S), at each label.
            Without positions each row is one document, without a mask none of it is padding.
        pad_id: the id on the padding added here.
        layer_chunks: those of the plan, which decide where sp_size > 1 which tokens are this rank's, see `TokenLayout`.

    Returns:
        {"input_ids", "shift_labels", "position_ids", "attention_mask"}: (B, L) int64, L = ceil(S / sp_size). The mask
        is 0 on padding, the batch's own and that added here, and 1 elsewhere. All positions stay below S. And
        "document_table", that of the whole sequence with its padding, the same for all ranks of the group, with the
        number of layer chunks, which a model whose plan has another number refuses.

    Raises:
        ValueError: padding has a label.
    """
    input_ids = batch["input_ids"]
    batch_size, seq_len = input_ids.shape
    layout = TokenLayout(topology.sp_size, layer_chunks)
    position_ids = batch.get("position_ids", torch.arange(seq_len, device=input_ids.device).expand(batch_size, -1))
    attention_mask = batch.get("attention_mask", torch.ones_like(input_ids))
    # Padding counts from 0 again: a learned position beyond S may not exist. It never has more than S tokens, save in
    # a world with more ranks than tokens.
    whole = {
        "input_ids": layout.padded(input_ids, pad_id),
        "shift_labels": layout.padded(shift_labels(batch["labels"]), IGNORE_INDEX),
        "position_ids": layout.padded(position_ids, 0),
        "attention_mask": layout.padded(attention_mask, 0),
    }
    if OLD_LOGPS in batch:
        # As labels are: what stands at a token is of the next one.
        whole[OLD_LOGPS] = layout.padded(pad(batch[OLD_LOGPS][..., 1:], (0, 1)), 0)
    added = whole["position_ids"].shape[1] - seq_len
    if added:
        whole["position_ids"][:, seq_len:] = torch.arange(added, device=input_ids.device) % seq_len
    if bool(((whole["attention_mask"] == 0) & (whole["shift_labels"] != IGNORE_INDEX)).any()):
        raise ValueError(f"labels must be {IGNORE_INDEX} after padding, where attention_mask is 0: it predicts nothing")
    # In memory of their own: a part of one row, which is contiguous, would carry the whole sequence along.
    shards = {
        name: layout.part(tensor, topology.sp_rank, dim=1).clone(memory_format=torch.contiguous_format)
        for name, tensor in whole.items()
    }
    return shards | {"document_table": document_table(whole["position_ids"], whole["attention_mask"], layout).cpu()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A shard as a model takes it: copied without waiting from pinned memory; what the host reads stays on the CPU."""
    return {name: tensor if name in ON_HOST else tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
