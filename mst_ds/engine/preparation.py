"""All checks of a run that need neither tokens, weights nor other processes, from cheap to dear."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from mst_ds.adapters import model_on_meta, requested_config, require_mergeable
from mst_ds.checkpoint import Checkpoint, Identity
from mst_ds.config import AUTO, TrainConfig
from mst_ds.data import load_tokenizer, rows_for
from mst_ds.dtypes import DTYPES
from mst_ds.engine.deepspeed_config import require_accepted
from mst_ds.engine.hardware import has_accelerator, rank_capability, rank_device_memory, rank_gpu, rank_host_memory
from mst_ds.engine.launch import Launch
from mst_ds.engine.optimizer import require_installed
from mst_ds.engine.resume import find_checkpoint
from mst_ds.engine.run import Run
from mst_ds.kept_in_fp32 import kept_in_fp32, require_no_adapters_on
from mst_ds.memory.mixers import with_mixers
from mst_ds.model_folder import (
    ModelLayout,
    SavedAdapter,
    Weights,
    WholeModel,
    fetch_processor_of,
    find_adapter,
    find_weights,
    find_whole,
    require_match,
    whole_on_meta,
    with_vocab_size,
)
from mst_ds.model_shape import (
    ModelShape,
    language_config,
    load_model_config,
    parse_rope_scaling,
    require_positions,
    scale_rope,
    unknown_positions,
)
from mst_ds.objective_flags import ObjectiveFlags
from mst_ds.optimizers import ADAMW, OPTIMIZERS
from mst_ds.patching import find_parts
from mst_ds.planner import DEFAULT_RESERVE, Plan, Request, make_request, plan_of_request, settle_sp_size
from mst_ds.preflight import require_exact, require_same_on_text
from mst_ds.structure import position_table, why_own_attention
from mst_ds.structure.trained import trained_shape
from mst_ds.zero import DsConfig, ResolvedConfig, fill_steps, has_block, kept_blocks, read_resolved

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

_LEAST_RATE_OF_LORA = 1e-4
# What a checkpoint calls them.
_SAMPLES = "samples of a step"


def prepare(config: TrainConfig, launch: Launch) -> Run:
    """Check the request, but for its data, and make this rank's plan, before weights load or processes meet.

    Raises:
        ValueError: anything in the flags, the DeepSpeed JSON, the model's config, its weights or the checkpoint that
            cannot run, in one line. Every rank finds the same, so all ranks stop.
    """
    checkpoint = find_checkpoint(config)
    require_installed(config.optim)
    whole_config = load_model_config(config.model, trust_remote_code=config.trust_remote_code)
    model_config = language_config(whole_config)
    is_part = model_config is not whole_config
    if config.rope_scaling is not None:
        scale_rope(model_config, parse_rope_scaling(config.rope_scaling))
    stored_config = model_config
    # All that follows is of the model with the rows that it needs.
    tokenizer = load_tokenizer(config, model_config) if config.added_tokens else None
    if tokenizer is not None:
        model_config = _with_rows_for(tokenizer, model_config)
    shape = ModelShape.from_config(model_config)
    resolved = _resolved(config, launch, shape)
    peft_config = requested_config(config.adapters)
    model, adapted = model_on_meta(model_config, peft_config)
    shape = trained_shape(shape, model)
    if shape.mixer_heads:
        shape = with_mixers(shape, model, DTYPES[resolved.zero.dtype])
    request = _settled(_request(config, launch, shape, resolved), checkpoint)
    plan = plan_of_request(request)
    _require_trainable(config, plan, model_config, peft_config, model, adapted)
    own_attention = _own_attention(config, plan, model)
    if model_config is not stored_config:
        _require_trained_rows(config, peft_config, model)
    dtype = DTYPES[plan.dtype]
    weights, notes = _weights(config, whole_on_meta(whole_config) if is_part else model, dtype, stored_config)
    whole = _whole(config, weights, whole_config, stored_config, dtype) if is_part else None
    adapter = _adapter(config, adapted, whole)
    more_notes = (
        whole.note(config.model) if whole else None,
        adapter.note(config.model) if adapter else None,
        unknown_positions(shape, config.seq_len),
        *_of_flags(config, stored_config, model_config),
    )
    if tokenizer is None:
        tokenizer = load_tokenizer(config, model_config)
    identity = Identity.of(
        model_config,
        peft_config,
        tokenizer,
        dtype=plan.dtype,
        zero_stage=plan.zero_stage,
        training=_kept_settings(config, plan, resolved.ds_config),
    )
    if checkpoint is not None:
        identity.require_same(checkpoint.identity, checkpoint.folder)
        _require_states_for(config, launch, resolved.ds_config, checkpoint)
    if config.preflight:
        require_exact(model_config, plan.settings, packed=config.has_documents)
        if is_part:
            require_same_on_text(whole_config, model_config)
    return Run(
        config=config,
        launch=launch,
        ds_config=resolved.ds_config,
        model_config=model_config,
        peft_config=peft_config,
        stored_vocab_size=stored_config.get_text_config().vocab_size,
        own_attention=own_attention,
        model_class=type(model),
        layout=ModelLayout.of(adapted),
        whole=None if whole is None else whole.with_language(model_config),
        weights=weights,
        adapter=adapter,
        notes=(*notes, *(note for note in more_notes if note is not None)),
        plan=plan,
        request=request,
        tokenizer=tokenizer,
        identity=identity,
        checkpoint=checkpoint,
    )


def _with_rows_for(tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig) -> PreTrainedConfig:
    """That of the model once it has a row for each token."""
    rows = rows_for(tokenizer)
    return model_config if rows <= model_config.get_text_config().vocab_size else with_vocab_size(model_config, rows)


def _resolved(config: TrainConfig, launch: Launch, shape: ModelShape) -> ResolvedConfig:
    """The DeepSpeed JSON, which DeepSpeed takes."""
    resolved = read_resolved(
        config.ds_config,
        train=config,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        world_size=launch.world_size,
        ranks_per_node=launch.local_world_size,
        has_accelerator=has_accelerator(),
    )
    # Where the length is given in epochs, any number of steps stands for theirs until the data is there.
    require_accepted(fill_steps(resolved.ds_config, config), resolved.zero)
    return resolved


def _request(config: TrainConfig, launch: Launch, shape: ModelShape, resolved: ResolvedConfig) -> Request:
    """What this rank's plan is made of, with its own device's memory for that of all."""
    return make_request(
        shape,
        resolved,
        seq_len=config.sample_len,
        device_memory=rank_device_memory(launch) if resolved.mst.device_memory_gib == AUTO else None,
        # On the CPU no context and no communication buffers stand beside the tensors.
        reserve=DEFAULT_RESERVE if has_accelerator() else 0,
        host_memory=rank_host_memory(launch),
        rank=launch.rank,
        ranks_per_node=launch.local_world_size,
        gpu=rank_gpu(launch),
        capability=rank_capability(launch),
        sequences_per_sample=config.sequences_per_sample,
    )


def _settled(request: Request, checkpoint: Checkpoint | None) -> Request:
    """With the `sp_size` of the plan; of a run that goes on, the one that gives its steps as many samples as before."""
    before = None if checkpoint is None else checkpoint.identity.training.get(_SAMPLES)
    zero = request.work.zero
    of_rank = zero.micro_batch_size * zero.gradient_accumulation_steps
    same = (option for option in request.options() if of_rank * option.topology.dp_size == before)
    return next(same, None) or settle_sp_size(request)


def _require_trainable(
    config: TrainConfig,
    plan: Plan,
    model_config: PreTrainedConfig,
    peft_config: PeftConfig | None,
    model: PreTrainedModel,
    adapted: PreTrainedModel | PeftModel,
) -> None:
    """Refuse what would not be trained as its plan says.

    Raises:
        ValueError: DeepSpeed computes it wrong, the model has fewer positions or is built in another way than the
            patches know, or adapters are where transformers keeps fp32 or cannot be merged as was asked for.
    """
    _require_right_training(plan)
    require_positions(position_table(model), config.seq_len)
    find_parts(adapted, plan.settings)
    if config.merge_adapter and peft_config is not None:
        require_mergeable(model_config, peft_config)
    if adapted is not model:
        # Adapters change names: those of `model` are no longer the ones that transformers matches.
        plain = model_on_meta(model_config, None)[0]
        require_no_adapters_on(kept_in_fp32(plain, DTYPES[plan.dtype]), adapted)


def _require_right_training(plan: Plan) -> None:
    """Refuse what DeepSpeed computes wrong.

    Raises:
        ValueError: ZeRO stage 0 in 16 bits.
    """
    if plan.zero_stage == 0 and plan.dtype != "fp32":
        # DeepSpeed's optimizer for it takes a step with zero gradients first, and does not scale an fp16 loss.
        raise ValueError(
            f"the ZeRO stage is 0 in {plan.dtype}, which DeepSpeed trains wrong; allowed: 1, 2, 3, or fp32"
        )


def _own_attention(config: TrainConfig, plan: Plan, model: PreTrainedModel) -> str | None:
    """See `Run`.

    Raises:
        ValueError: a model that keeps its own attention is to train on packed documents.
    """
    reason = why_own_attention(model)
    if config.sequences_per_sample > 1 and reason is not None:
        raise ValueError(
            f"objective is {config.objective!r}, whose answers share a sample, but {type(model).__name__} {reason}; "
            "allowed: 'sft'"
        )
    if config.packing == "documents" and reason is not None:
        raise ValueError(f"packing is 'documents', but {type(model).__name__} {reason}; allowed: 'none'")
    # Any other model gets the attention of its plan from apply_plan.
    attention = plan.settings.attention
    return attention if attention != "sdpa" and reason is not None else None


def _of_flags(config: TrainConfig, stored: PreTrainedConfig, model_config: PreTrainedConfig) -> Iterator[str | None]:
    """What a user should know of the flags."""
    yield _of_pairs(config)
    yield _of_rate(config)
    yield _of_tokens(config, stored, model_config)


def _of_pairs(config: TrainConfig) -> str | None:
    """What a user should know of the samples of a preference."""
    if config.sequences_per_sample == 1:
        return None
    answers = "an answer and another prompt's" if config.objective == "kto" else "the two answers of a pair"
    return (
        f"objective {config.objective}: a sample has {config.sample_len} tokens, for {answers}, of up to "
        f"{config.seq_len} tokens each with their prompt"
    )


def _of_rate(config: TrainConfig) -> str | None:
    """A rate for all weights moves adapters little. TRL has one default, too, and ten times it in its examples."""
    is_default = config.learning_rate is None and not config.has_answers
    if config.adapters is None or not is_default or config.peak_learning_rate >= _LEAST_RATE_OF_LORA:
        return None
    return (
        f"the learning rate is {config.peak_learning_rate:g}, the default, for adapters too; usual for LoRA are "
        "1e-4 to 2e-4 (--learning_rate)"
    )


def _of_tokens(config: TrainConfig, stored: PreTrainedConfig, model_config: PreTrainedConfig) -> str | None:
    """What becomes of the tokens that are added."""
    if not config.added_tokens:
        return None
    before, after = (each.get_text_config().vocab_size for each in (stored, model_config))
    rows = f"{after - before} new rows, around the mean of its {before}" if after > before else "rows for them already"
    return f"added tokens: {' '.join(map(repr, config.added_tokens))}; the model has {rows}"


def _require_trained_rows(config: TrainConfig, peft_config: PeftConfig | None, model: PreTrainedModel) -> None:
    """Refuse added tokens whose rows would stay as they begin, and be in no file of adapters.

    Args:
        model: with the adapters in it.

    Raises:
        ValueError: tokens are added, and the adapters train not the embedding, or not the LM head.
    """
    if not config.added_tokens or peft_config is None:
        return
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if not any(parameter.requires_grad for parameter in module.parameters()):
            names = [name.rpartition(".")[2] for name, each in model.named_modules() if each is module]
            raise ValueError(
                f"tokens are added ({' '.join(map(repr, config.added_tokens))}), but the adapters do not train "
                f"{names[0]}, where the model has their rows; allowed: --peft_config with an adapter_config.json whose "
                "modules_to_save names embedding and LM head, or the model itself trained"
            )


def _weights(
    config: TrainConfig, model: PreTrainedModel, dtype: torch.dtype, stored_config: PreTrainedConfig
) -> tuple[Weights | None, tuple[str, ...]]:
    """What the model starts from, and what a user should know of it.

    Args:
        model: that the weights are of; a multimodal one where its language model is trained.
        stored_config: that of the weights, which may have fewer rows than `model`.

    Raises:
        ValueError: a weight file is missing or damaged, or the weights are not those of the model.
    """
    weights = find_weights(config.model)
    if weights is not None:
        # A multimodal model is as it is stored.
        if stored_config.get_text_config().vocab_size < model.config.get_text_config().vocab_size:
            model = model_on_meta(stored_config, None)[0]
        return weights, require_match(weights, model, dtype=dtype, new_lm_head=config.new_lm_head)
    if config.new_lm_head:
        raise ValueError(f"new_lm_head is true, but model {config.model!r} has no weights; allowed: no --new_lm_head")
    return None, (f"model {config.model!r} has no weights: it starts from random ones",)


def _whole(
    config: TrainConfig,
    weights: Weights | None,
    whole_config: PreTrainedConfig,
    stored_config: PreTrainedConfig,
    dtype: torch.dtype,
) -> WholeModel:
    """The multimodal model whose language model is trained, all of whose files are on this machine then.

    Raises:
        ValueError: see `find_whole`, or its processor cannot be had.
    """
    fetch_processor_of(config.model)
    return find_whole(weights, whole_config, stored_config, dtype=dtype, seed=config.seed)


def _adapter(config: TrainConfig, adapted: Any, whole: WholeModel | None) -> SavedAdapter | None:
    """The trained adapter that the run goes on with.

    Raises:
        ValueError: a file of it is missing or damaged, or it is not one of this model.
    """
    if config.adapter is None:
        return None
    adapter = find_adapter(config.adapter, whole)
    adapter.require_match(adapted)
    return adapter


def _require_states_for(config: TrainConfig, launch: Launch, ds_config: DsConfig, checkpoint: Checkpoint) -> None:
    """Refuse to go on with an optimizer whose states DeepSpeed does not take to another number of ranks.

    Raises:
        ValueError: the checkpoint is of as many ranks as those states are of, and this run has another number.
    """
    is_adamw = has_block(ds_config, "optimizer") or OPTIMIZERS[config.optim] == OPTIMIZERS[ADAMW]
    if not is_adamw and checkpoint.identity.zero_stage > 0 and checkpoint.world_size != launch.world_size:
        raise ValueError(
            f"optim is {config.optim!r}, whose states are in {checkpoint.folder} for {checkpoint.world_size} ranks, "
            f"but this run has {launch.world_size}; allowed: {checkpoint.world_size} ranks, or {ADAMW} from the start"
        )


def _kept_settings(config: TrainConfig, plan: Plan, ds_config: DsConfig) -> dict[str, Any]:
    """Settings of the optimizer and of the data whose values come from a checkpoint, by who owns them."""
    kept: dict[str, Any] = {"seed": config.seed, _SAMPLES: plan.samples_per_step} | kept_blocks(ds_config)
    if config.has_answers:
        kept |= {flag.name: getattr(config, flag.name) for flag in dataclasses.fields(ObjectiveFlags)}
        kept["beta"] = config.beta_or_default
    if has_block(ds_config, "optimizer"):
        return kept
    names = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    if OPTIMIZERS[config.optim] != OPTIMIZERS[ADAMW]:
        # Two names of one optimizer are the same.
        kept["optimizer"] = next(name for name, each in OPTIMIZERS.items() if each == OPTIMIZERS[config.optim])
    return kept | {name: getattr(config, name) for name in names} | {"learning_rate": config.peak_learning_rate}
