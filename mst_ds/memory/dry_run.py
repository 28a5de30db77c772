"""A plan tried without memory: the real, patched model runs a forward, the loss and a backward on fake tensors."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from mst_ds.adapters import model_on_meta
from mst_ds.attention import AttentionSpec, KeyBlock, attend, blockwise, chunk, indexed
from mst_ds.attention.choice import choose_block_kernel, choose_kernel
from mst_ds.attention.flash import TorchFlash
from mst_ds.attention.kernel import Kernel
from mst_ds.dtypes import DTYPES
from mst_ds.geometry import ELEMENTS_THAT_KEEP_BUSY, flash_query_gradient, has_flash_attention
from mst_ds.memory.live import LiveMemory
from mst_ds.minisequence import chunks, experts
from mst_ds.mixers import indexer
from mst_ds.patching import apply_plan, decoder, decoder_of
from mst_ds.planner import Plan
from mst_ds.recompute import stores
from mst_ds.sequence_parallel import sequence_attention
from mst_ds.sequence_parallel.carried_keys import CarriedKeys

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedConfig

_PHASES = ("forward", "loss", "backward")
_FLASH_BACKWARDS = (
    torch.ops.aten._flash_attention_backward.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)


@dataclass(frozen=True)
class _AbsentRanks:
    """A sequence group whose other ranks send nothing: their tensors have shapes alone."""

    rank: int
    size: int

    def all_to_all(self, received: Tensor, send: Tensor, receive_splits: list[int], send_splits: list[int]) -> None:
        """Leaves `received` as it is."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [torch.empty_like(tensor) for _ in range(self.size)]

    def all_reduce(self, tensor: Tensor) -> None:
        """Leaves `tensor` as it is."""


def dry_run(
    model_config: PreTrainedConfig,
    plan: Plan,
    peft_config: PeftConfig | None = None,
    *,
    capability: tuple[int, int] | None = None,
) -> dict[str, int]:
    """The most bytes of activations and of kernels' workspace alive on the device in the forward, the loss and the
    backward of a micro-batch.

    All layers run, at the plan's length and chunk counts, with torch's attention kernel. Parameters and gradients stand
    there before, and what DeepSpeed does with them is not seen; compare with `planned_activations`.

    Args:
        capability: of CUDA, of the GPU that is planned for; None: not known.

    Raises:
        ValueError: the model cannot be patched, or what it computes depends on values other than a choice of experts.
    """
    # Finding a model's structure runs small real tensors, so that it is not done on fake ones.
    model: Any = model_on_meta(model_config, peft_config, DTYPES[plan.dtype])[1]
    model.train()
    apply_plan(model, plan, sequence_group=_AbsentRanks(plan.sp_rank, plan.sp_size) if plan.sp_size > 1 else None)
    peaks: dict[str, int] = {}
    shape = (plan.micro_batch_size, plan.shard_length)
    with FakeTensorMode(), as_on_an_accelerator(capability):
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        tokens = torch.empty(shape, dtype=torch.long)
        memory = LiveMemory()

        def end(phase: str) -> None:
            peaks[phase] = memory.peak
            memory.reset_peak()

        def begin_loss(decoder: nn.Module, inputs: Any, outputs: Any) -> None:
            end("forward")
            # The loss ends in the backward, where its gradients are scaled.
            outputs.last_hidden_state.register_hook(lambda _: end("loss"))

        decoder_of(model).register_forward_hook(begin_loss)
        try:
            with memory, host_left_out(memory), _largest_pieces(), KernelWorkspace():
                inputs = {"input_ids": tokens, "position_ids": tokens, "shift_labels": tokens}
                loss = model(**inputs, num_items_in_batch=tokens.numel()).loss
                loss.backward()
                end("backward")
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise ValueError(f"{type(model).__name__} decides by values what it computes, and has no dry run") from None
    return peaks


class KernelWorkspace(TorchDispatchMode):
    """What flash attention's backward allocates on an accelerator, beside what the CPU's operator is seen to."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for more often than all else together
        kwargs = kwargs or {}
        workspace: tuple[Tensor, ...] = ()
        if func in _FLASH_BACKWARDS and args[0].itemsize == 2:
            query, key = (x if x.dim() == 4 else x.unsqueeze(0) for x in args[1:3])  # documents lie in one row
            if func is _FLASH_BACKWARDS[0]:  # it takes tokens before heads
                query, key = query.transpose(1, 2), key.transpose(1, 2)
            of_sequence = flash_query_gradient(query.shape[2], query.shape[3])
            workspace = (query.new_empty(*query.shape[:2], *of_sequence, dtype=torch.float32),)
            if key.shape[1] != query.shape[1]:
                shape = (*query.shape[:2], *key.shape[2:])
                workspace += key.new_empty(shape), key.new_empty(shape)
        result = func(*args, **kwargs)
        del workspace  # not before its gradients are there
        return result


@contextmanager
def as_on_an_accelerator(capability: tuple[int, int] | None = None) -> Iterator[None]:
    """Products of 16 bits are summed in fp32 without copies, elementwise work takes chunks as large as there, flash
    attention runs where it has a kernel; and positions, which have no values, begin no documents."""
    said_and_found = ("take_document_starts", "find_document_starts", "document_lengths")
    no_documents: dict[str, Any] = dict.fromkeys(said_and_found, lambda *_: None)
    no_copies = {"products_in_fp32": lambda *_: chunks.ProductsInFp32(added=True, alone=True)}
    with (
        _replaced(decoder, **no_documents),
        _replaced(attend, choose_kernel=functools.partial(_kernel_of_an_accelerator, capability)),
        _replaced(chunk, choose_block_kernel=functools.partial(_block_kernel_of_an_accelerator, capability)),
        _replaced(blockwise, is_on_cpu=lambda _: False),
        _replaced(indexed, is_on_cpu=lambda _: False),
        _replaced(indexer, is_on_cpu=lambda _: False),
        _replaced(chunks, **no_copies, ELEMENTS_IN_CACHE_OF_CPU=ELEMENTS_THAT_KEEP_BUSY),
    ):
        yield


def _kernel_of_an_accelerator(
    capability: tuple[int, int] | None, name: str, query: Tensor, spec: AttentionSpec, *rest: Any
) -> Kernel:
    return TorchFlash() if _has_flash(query, spec, capability) else choose_kernel(name, query, spec, *rest)


def _block_kernel_of_an_accelerator(
    capability: tuple[int, int] | None, name: str, query: Tensor, keys: int, spec: AttentionSpec, *rest: Any
) -> Kernel:
    if _has_flash(query, spec, capability):
        return TorchFlash(is_causal=False)
    return choose_block_kernel(name, query, keys, spec, *rest)


def _has_flash(query: Tensor, spec: AttentionSpec, capability: tuple[int, int] | None) -> bool:
    return spec.softcap is None and has_flash_attention(query.itemsize, query.shape[3], capability)


@contextmanager
def only_the_largest_blocks() -> Iterator[None]:
    """Attention without a kernel, thousands of blocks in Python, stops at none of them before the last three.

    Nothing is larger in those: all blocks have as many queries, the last at most as many, and none has fewer keys than
    the one before. Three, because a block is done while the gradients of the one before it are still there.

    A chunk of a layer, in its backward, reads the last of the chunks before it alone, once all of these have gradients.
    """

    def last(blocks: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        return lambda *sizes: iter(deque(blocks(*sizes), maxlen=3))

    with (
        _replaced(blockwise, _blocks=last(blockwise._blocks)),
        _replaced(indexed, _pieces=last(indexed._pieces)),
        _replaced(indexer, _blocks=last(indexer._blocks)),
        _replaced(sequence_attention, CarriedKeys=_LastCarriedKeys),
    ):
        yield


class _LastCarriedKeys(CarriedKeys):
    # Of what is read in turn the one that is read and the one on its way; more, so that a fault would be seen.
    _READ = 4

    def earlier(self, tokens: slice, *, by_chunk: bool) -> Iterator[KeyBlock]:
        starts = [span.start for span in self._spans if tokens.start <= span.start < tokens.stop]
        # With a window a chunk's keys are put together of all blocks.
        if by_chunk and self._gradients and not self._by_chunk and len(starts) > self._READ:
            tokens = slice(starts[-self._READ], tokens.stop)
        return super().earlier(tokens, by_chunk=by_chunk)


@contextmanager
def _largest_pieces() -> Iterator[None]:
    with only_the_largest_blocks(), tokens_at_the_same_experts():
        yield


@contextmanager
def tokens_at_the_same_experts() -> Iterator[None]:
    """Within, all tokens go to the first experts, which has the longest chunks that there can be, as a plan has them: a
    choice of experts has no values here."""

    def ends_of_first(ends: Tensor, of_tokens: torch.Size) -> list[int]:
        tokens, of_each = of_tokens
        return [min(expert, of_each) * tokens for expert in range(1, len(ends) + 1)]

    with _replaced(experts, read_ends=ends_of_first):
        yield


@contextmanager
def host_left_out(memory: LiveMemory) -> Iterator[None]:
    """Within, what recompute keeps on the host is not counted, also where host and device are one memory."""
    empty_on_host = stores._empty_on_host

    def uncounted(*args: Any) -> Tensor:
        with memory.leave_out():
            return empty_on_host(*args)

    with _replaced(stores, _empty_on_host=uncounted):
        yield


@contextmanager
def _replaced(module: ModuleType, **values: Any) -> Iterator[None]:
    """Within, these names of a module have other values: operators have no knobs for what only a dry run wants.

    Raises:
        AttributeError: the module has no such name, so that nothing would be replaced.
    """
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


def planned_activations(plan: Plan) -> Mapping[str, int]:
    """What the plan's formulas say for each phase of `dry_run`."""
    return {
        phase.name: phase.kind_bytes("activation") + phase.kind_bytes("workspace")
        for phase in plan.phases
        if phase.name in ("forward", "loss", "backward")
    }
