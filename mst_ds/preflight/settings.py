"""What a preflight compares: the part of a plan that decides what is computed, without its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from mst_ds.config import AUTO, Auto, MstConfig
from mst_ds.planner import Plan
from mst_ds.topology import Topology, shard_length

# One chunk, some of unequal length, and many; and of each other setting all that a plan may choose:
# (chunks, recompute, keep_attention, offload_activations, keep_mlp, head_groups).
_TRIED = (
    (1, True, False, False, False, 1),
    (4, False, False, False, True, 1),
    (4, True, True, False, False, 1),
    (64, True, True, True, True, 2),
)
_SP_SIZES = (1, 2)
# Of a run's own numbers: two ranks stand for any that share a sequence, three chunks for a first, a middle and a last,
# two groups of heads for several.
_SEVERAL_RANKS, _SEVERAL_CHUNKS, _SEVERAL_GROUPS = 2, 3, 2


@dataclass(frozen=True)
class Setting:
    """What of a plan decides what is computed, and whether documents are packed or padded."""

    sp_size: int
    mlp_chunks: int
    loss_chunks: int
    recompute: bool
    packed: bool
    keep_attention: bool = False
    offload_activations: bool = False
    keep_mlp: bool = False
    head_groups: int = 1

    def __str__(self) -> str:
        chunks = f"{self.mlp_chunks} chunk{'s' * (self.mlp_chunks > 1)}"
        if self.mlp_chunks != self.loss_chunks:
            chunks = f"mlp_chunks {self.mlp_chunks}, loss_chunks {self.loss_chunks}"
        chosen = {
            "recompute": self.recompute,
            "attention kept": self.keep_attention,
            "offload": self.offload_activations,
            "gate and up kept": self.keep_mlp,
            f"{self.head_groups} head groups": self.head_groups > 1,
        }
        kept = [name for name, is_chosen in chosen.items() if is_chosen]
        return ", ".join([f"sp {self.sp_size}", chunks, *kept, "packed" if self.packed else "padded"])

    def plan(self, sp_rank: int, *, seq_len: int, batch_size: int) -> Plan:
        """The plan of one rank of a single sequence group, without the planner's search and its memory terms."""
        topology = Topology(rank=sp_rank, world_size=self.sp_size, sp_size=self.sp_size)
        return Plan(
            topology=topology,
            seq_len=seq_len,
            shard_length=shard_length(seq_len, self.sp_size),
            micro_batch_size=batch_size,
            gradient_accumulation_steps=1,
            zero_stage=0,
            dtype="fp32",
            mlp_chunks=self.mlp_chunks,
            loss_chunks=self.loss_chunks,
            recompute=self.recompute,
            keep_attention=self.keep_attention,
            offload_activations=self.offload_activations,
            keep_mlp=self.keep_mlp,
            head_groups=self.head_groups,
            attention="sdpa",
            device_memory=0,
            phases=(),
        )

    def min_tokens(self) -> int:
        """The fewest tokens of a rank that make as many chunks as asked for: none is shorter than 4 tokens."""
        return 4 * max(self.mlp_chunks, self.loss_chunks)


def setting_of_run(plan: Plan, *, packed: bool) -> Setting:
    """What stands for a run with this plan, as small as it can be."""
    return Setting(
        sp_size=min(plan.sp_size, _SEVERAL_RANKS),
        mlp_chunks=min(plan.mlp_chunks, _SEVERAL_CHUNKS),
        loss_chunks=min(plan.loss_chunks, _SEVERAL_CHUNKS),
        recompute=plan.recompute,
        packed=packed,
        keep_attention=plan.keep_attention,
        offload_activations=plan.offload_activations,
        keep_mlp=plan.keep_mlp,
        head_groups=min(plan.head_groups, _SEVERAL_GROUPS),
    )


def settings_to_try(mst: MstConfig, *, packed: bool) -> list[Setting]:
    """One rank and two, few chunks and many, without recompute and with; what the "mst" block rules out is left out."""
    needs_recompute = mst.keep_attention is True or mst.offload_activations is True
    settings = []
    for sp_size in sorted({_at_most(mst.sp_size, sp_size) for sp_size in _SP_SIZES}):
        for chunks, tried, keep_attention, offload_activations, keep_mlp, head_groups in _TRIED:
            recompute = needs_recompute or _asked(mst.recompute, tried)
            setting = Setting(
                sp_size=sp_size,
                mlp_chunks=_at_most(mst.mlp_chunks, chunks),
                loss_chunks=_at_most(mst.loss_chunks, chunks),
                recompute=recompute,
                packed=packed,
                keep_attention=recompute and _asked(mst.keep_attention, keep_attention),
                offload_activations=recompute and _asked(mst.offload_activations, offload_activations),
                keep_mlp=_asked(mst.keep_mlp, keep_mlp),
                head_groups=_at_most(mst.head_groups, head_groups) if sp_size > 1 else 1,
            )
            settings.append(setting)
    return list(dict.fromkeys(settings))


def _asked(asked: bool | Auto, tried: bool) -> bool:
    return tried if asked == AUTO else bool(asked)


def _at_most(asked: int | Auto, tried: int) -> int:
    return 1 if asked == 1 else tried
