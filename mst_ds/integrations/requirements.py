"""What a trainer may be asked for beside a plan: everything else would be silently wrong, and is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Of TRL's trainers those whose loss is a sum over a rank's own tokens,
_OF_SHARDS = ("SFTTrainer",)
# and those that make theirs of the log-probabilities of whole sequences, which TRL's fused head gives.
_OF_SEQUENCES = ("DPOTrainer", "KTOTrainer")


def trainer_of_trl(trainer: Any) -> str | None:
    """The name of the trainer of TRL that this one is made of; None without one."""
    bases = type(trainer).__mro__
    return next((base.__name__ for base in bases if base.__module__.partition(".")[0] == "trl"), None)


def needs_whole_batches(trainer: Any) -> bool:
    """Whether the loss needs every token's log-probability on each rank, also where the model runs on shards."""
    return trainer_of_trl(trainer) in _OF_SEQUENCES


def require_plannable(trainer: Any) -> None:
    """Refuse what goes past a plan, before there is one.

    Raises:
        ValueError: in one line with what is allowed.
    """
    args, parallelism = trainer.args, trainer.accelerator.parallelism_config
    sizes = {} if parallelism is None else {name: getattr(parallelism, f"{name}_size") for name in ("sp", "cp", "tp")}
    for name, size in sizes.items():
        if size > 1:
            raise ValueError(
                f"the ParallelismConfig of accelerate has {name}_size {size}, which a plan of mst_ds knows nothing of; "
                'allowed: sp_size in the "mst" block, which takes its place'
            )
    for name, asked in {
        "use_liger_kernel": args.use_liger_kernel,
        "torch_compile": args.torch_compile,
        "fsdp": args.fsdp or trainer.is_fsdp_enabled,
    }.items():
        if asked:
            raise ValueError(
                f"{name} is set, which replaces or wraps the parts of the model that a plan of mst_ds calls; allowed: "
                f"no {name}"
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs, for which transformers copies the model by DataParallel, and a plan "
            "is of one model; allowed: a process for each GPU (torchrun, deepspeed, accelerate launch)"
        )


def require_logits_are_reduced(trainer: Any) -> None:
    """Refuse an evaluation that would keep the logits of all batches.

    Raises:
        ValueError: there are metrics, and nothing makes less of the logits for them.
    """
    if trainer.compute_metrics is not None and trainer.preprocess_logits_for_metrics is None:
        raise ValueError(
            "compute_metrics is set without preprocess_logits_for_metrics, which would keep the logits of a whole "
            "evaluation; allowed: preprocess_logits_for_metrics, such as the argmax of the logits, beside it"
        )


def require_shardable_training(trainer: Any, sp_size: int) -> None:
    """Refuse what would be computed of a shard as if it were the whole sequence.

    Raises:
        ValueError: in one line with what is allowed.
    """
    for what, allowed in _not_of_shards(trainer):
        raise ValueError(f"{what} with sp_size {sp_size}; allowed: {allowed}, or sp_size 1")


def _not_of_shards(trainer: Any) -> Iterator[tuple[str, str]]:
    args, own = trainer.args, trainer_of_trl(trainer)
    if own not in (None, *_OF_SHARDS, *_OF_SEQUENCES):
        yield (
            f"{own} does more with a sequence than sum over its tokens, and cannot be trained",
            f"transformers' Trainer, {', '.join(_OF_SHARDS + _OF_SEQUENCES)}",
        )
    if args.label_smoothing_factor:
        yield "label_smoothing_factor is set, whose loss knows no shards,", "label_smoothing_factor 0"
    if args.neftune_noise_alpha is not None:
        yield "neftune_noise_alpha is set, whose noise follows from the length of a shard,", "no neftune_noise_alpha"
    if not args.average_tokens_across_devices:
        yield (
            "average_tokens_across_devices is false, but the ranks of a sequence share its tokens,",
            "average_tokens_across_devices true",
        )
    if trainer.compute_loss_func is not None:
        yield "compute_loss_func is set, which gets no logits of the whole sequence,", "no compute_loss_func"
    if trainer.compute_metrics is not None:
        yield "compute_metrics is set, which gets no logits of the whole sequence,", "no compute_metrics"
    if args.train_sampling_strategy == "batch_rebalance":
        yield (
            "train_sampling_strategy is 'batch_rebalance', which gives every rank another batch,",
            "'random', 'sequential', 'group_by_length'",
        )
    if args.accelerator_config.dispatch_batches:
        yield (
            "dispatch_batches is true, with which one rank cuts a batch for all ranks,",
            "dispatch_batches false",
        )
    if getattr(trainer, "aux_loss_enabled", False):
        yield (
            "router_aux_loss_coef is set, whose loss TRL computes of each shard by itself,",
            "router_aux_loss_coef 0, transformers' Trainer",
        )
