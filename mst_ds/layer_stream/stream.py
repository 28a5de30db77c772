"""The loop over the chunks of a decoder layer, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import chunk_slices
from mst_ds.minisequence import ParameterSums, SumLinearGradients, hooks_put_off
from mst_ds.recompute import Conditions, DeviceStore, Kept, KeptOnDevice, Store, read_in_turn

from .arguments import LayerArguments
from .call import KeysAreThere, LayerCall, Pass
from .handed_on import TOKEN_DIM, Written
from .handed_over import BeginWith, holders_of_handed_over, is_handed_over, references_of_hooks, take_over
from .last_output import LastOutput
from .recorded import Records, cut, hand_on, joined, recording, recording_of

Forward = Callable[..., Any]


class LayerStream:
    """Runs the decoder layers of one model chunk by chunk.

    1. Forward: the layer's own forward runs on one chunk of tokens after another, without a graph. Kept are its input,
       and what its operators ask for. Attention adds the chunk's keys and values to those of the chunks before.
    2. Backward, in reverse: each chunk is computed again with what was kept, differentiated by autograd, and adds to
       the gradients of the keys and values before it, which are complete when their own chunk's turn comes. Parameter
       gradients are summed over chunks in fp32 and leave through autograd once.

    It is StreamBP (arXiv 2506.03077) without its second attention. One chunk is ordinary recompute.

    Args:
        chunks: how many; fewer where a chunk would be shorter than 4 tokens.
        keep_attention: whether what attention computes is kept, and not computed again.

    Attributes:
        store: where what is kept lies.
        call: of the layer that runs, None outside one.
        is_paused: whether layers run as they are.
        context: what the forward that runs tells its operators, None between forwards. A call keeps it for its
            backward.
        form: B and L of the forward, None where nobody said so.
    """

    def __init__(self, *, chunks: int = 1, keep_attention: bool = False, store: Store | None = None) -> None:
        self.chunks, self.keep_attention = chunks, keep_attention
        self.call: LayerCall | None = None
        self.store = DeviceStore() if store is None else store
        self.is_paused = False
        self.context: Any = None
        self.form: tuple[int, int] | None = None
        holders_of_handed_over()

    def begin_forward(self, form: tuple[int, int] | None = None) -> None:
        """A forward of the model begins, of so many rows and tokens of each, where that is known."""
        self.form = form
        self.store.begin_forward()

    def cut(self, length: int) -> list[slice]:
        """The chunks of so many tokens."""
        return list(chunk_slices(length, self.chunks))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, layers run as they are, as for steps of generation."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    @contextmanager
    def entered(self, call: LayerCall) -> Iterator[None]:
        """Within, operators see this call."""
        outer, self.call = self.call, call
        try:
            yield
        finally:
            self.call = outer


class StreamedLayer:
    """The forward of a decoder layer in a stream.

    Args:
        layer: whose forward, as it is now, runs on each chunk.
    """

    def __init__(self, stream: LayerStream, layer: nn.Module) -> None:
        self.stream, self._layer, self._forward = stream, layer, layer.forward
        # By which of its parameters are trained.
        self._last_outputs: dict[tuple[bool, ...], LastOutput] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives; its backward computes everything again but what is kept.

        Args:
            args, kwargs: of the layer, see `LayerArguments`.
        """
        stream = self.stream
        if stream.is_paused:
            return self._forward(*args, **kwargs)
        arguments = LayerArguments(args, kwargs, stream.form)
        inputs = arguments.take_inputs()
        all_parameters = list(self._layer.parameters())
        is_trained = tuple(parameter.requires_grad for parameter in all_parameters)
        parameters = [parameter for parameter in all_parameters if parameter.requires_grad]
        is_kept = torch.is_grad_enabled() and (any(is_trained) or any(tensor.requires_grad for tensor in inputs))
        last_output = self._last_outputs.setdefault(is_trained, LastOutput())
        call = LayerCall(
            stream.cut(arguments.length), stream.store, last_output, is_kept=is_kept, context=stream.context
        )
        run = _LayerRun(stream, call, self._forward, arguments, parameters, references_of_hooks(self._layer))
        tensors = _Streamed.apply(run, *inputs, *parameters) if is_kept else run.forward(inputs)
        return run.given(tensors)


def stream_of(model: nn.Module) -> LayerStream | None:
    """The stream of a model's layers; None where they run as they are."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return next((forward.stream for forward in forwards if isinstance(forward, StreamedLayer)), None)


class _LayerRun:
    """One call of a layer, with all that its backward needs."""

    def __init__(
        self,
        stream: LayerStream,
        call: LayerCall,
        forward: Forward,
        arguments: LayerArguments,
        parameters: Sequence[Tensor],
        of_hooks: int,
    ) -> None:
        self.stream, self.call, self.layer_forward = stream, call, forward
        self.arguments, self.parameters, self._of_hooks = arguments, parameters, of_hooks
        self._inputs: list[tuple[Kept, ...]] = []
        self._forms: list[Tensor] = []
        self._conditions: list[Conditions] = []
        self._leaves: list[Any] = []
        self._dims: list[int] = []
        self._spec: TreeSpec | None = None
        self._recorded: list[str] = []

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors that the layer gives, and then those that its modules record."""
        call, arguments = self.call, self.arguments
        self._forms = [torch.empty_like(tensor, device="meta") for tensor in inputs]
        records: list[Records] = []
        with torch.no_grad(), self.stream.entered(call):
            for index, tokens in enumerate(call.chunks):
                call.begin(index, Pass.FORWARD)
                of_chunk = [arguments.cut_input(place, tensor, tokens) for place, tensor in enumerate(inputs)]
                if call.is_kept:
                    self._inputs.append(self._keep(of_chunk))
                    self._conditions.append(Conditions(of_chunk[0].device))
                with recording() as recorded:
                    self._put(self._run(tokens, of_chunk), tokens)
                records.append(recorded)
            call.end_forward()
        whole = {
            name: [joined(parts, arguments.batch) for parts in zip(*(each[name] for each in records), strict=True)]
            for name in records[0]
        }
        self._recorded = [name for name, tensors in whole.items() for _ in tensors]
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self._leaves = [None if isinstance(leaf, Tensor) else _Other(leaf) for leaf in self._leaves]
        return (*tensors, *(tensor for tensors in whole.values() for tensor in tensors))

    def _keep(self, inputs: Sequence[Tensor]) -> tuple[Kept, ...]:
        """A chunk's inputs. What was handed on stays where it is, whole, for all layers that read it."""
        own = self.arguments.num_own
        return *map(self.call.part.keep, inputs[:own]), *map(KeptOnDevice, inputs[own:])

    def given(self, tensors: Sequence[Tensor]) -> Any:
        """What the layer gives, of what `forward` gave. What is recorded is, and what it hands on is handed on."""
        outputs = iter(tensors)
        leaves = [next(outputs) if leaf is None else leaf.value for leaf in self._leaves]
        for name, tensor in zip(self._recorded, outputs, strict=True):
            hand_on({name: [tensor]})
        assert self._spec is not None
        output, written = tree_unflatten(leaves, self._spec)
        self.arguments.handed_on.write(written)
        return output

    def backward(self, grads: Sequence[Tensor | None], needs_inputs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs and of the parameters, from those of what `forward` gave."""
        call, chunks = self.call, self.call.chunks
        call.sums = ParameterSums(self.parameters)
        d_inputs: list[Tensor | None] = [None] * len(needs_inputs)
        device = self._conditions[0].device
        own: list[Tensor] = []
        if is_handed_over(grads, self._forms[0], device, self._of_hooks):
            assert grads[0] is not None
            if len(chunks) == 1:
                own = [take_over(grads[0])]
            elif needs_inputs[0]:
                # A chunk's gradient of the output is not read again: that of its input is written over it.
                d_inputs[0] = grads[0]
        with self.stream.entered(call):
            for index in reversed(range(len(chunks))):
                self._compute_keys(call.keys_to_compute(index))
                call.begin(index, Pass.BACKWARD)
                self._put_gradients(d_inputs, self._differentiate(index, grads, own, needs_inputs), chunks[index])
                call.end(index)
        sums, call.sums = call.sums, None
        d_forms = zip(d_inputs, self._forms, strict=True)
        rounded = [None if grad is None else grad.to(form.dtype) for grad, form in d_forms]
        return *rounded, *(each.rounded() for each in sums.sums)

    def _run(self, tokens: slice, inputs: Sequence[Tensor]) -> Any:
        args, kwargs, mappings = self.arguments.chunk(tokens, inputs)
        return self.layer_forward(*args, **kwargs), mappings.written()

    def _put(self, given: tuple[Any, Written], tokens: slice) -> None:
        """Write what a chunk gives, and puts into mappings, where it belongs."""
        leaves, self._spec = tree_flatten(given)
        length, of_hidden, hidden_dims = self.arguments.length, self.arguments.hidden_dim, self.arguments.hidden_dims
        own = len(tree_flatten(given[0])[0])
        dims = [of_hidden if isinstance(leaf, Tensor) and leaf.dim() == hidden_dims else 1 for leaf in leaves[:own]]
        self._dims = [*dims, *[TOKEN_DIM] * (len(leaves) - own)]
        if tokens == slice(0, length):
            self._leaves = leaves
            return
        if not self._leaves:
            self._leaves = [
                self._empty(leaf, dim, tokens) if isinstance(leaf, Tensor) else leaf
                for leaf, dim in zip(leaves, self._dims, strict=True)
            ]
        for whole, leaf, dim in zip(self._leaves, leaves, self._dims, strict=True):
            if isinstance(leaf, Tensor):
                self.arguments.cut_along(dim, whole, tokens).copy_(leaf)

    def _empty(self, of_chunk: Tensor, dim: int, tokens: slice) -> Tensor:
        """For all tokens, of which this dimension has those of a chunk.

        Raises:
            ValueError: there are none in what the layer gives.
        """
        if of_chunk.dim() <= dim or of_chunk.shape[dim] != tokens.stop - tokens.start:
            raise ValueError(
                f"a decoder layer gives a tensor {tuple(of_chunk.shape)} without tokens, which cannot be put together "
                'of chunks: set "layer_chunks": 1 in the "mst" block'
            )
        return of_chunk.new_empty(*of_chunk.shape[:dim], self.arguments.length, *of_chunk.shape[dim + 1 :])

    def _compute_keys(self, chunks: Sequence[int]) -> None:
        call = self.call
        with torch.no_grad():
            reads = read_in_turn([self._inputs[index] for index in chunks])
            for index in chunks:
                call.begin(index, Pass.KEYS)
                with self._conditions[index].restored(), suppress(KeysAreThere):
                    self._run(call.chunks[index], next(reads))

    def _differentiate(
        self, index: int, grads: Sequence[Tensor | None], own: list[Tensor], needs_inputs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Compute a chunk again; add its parameter gradients to the sums, and return those of its inputs.

        own: the first of `grads`, to be taken, where it is nobody else's.
        """
        call, tokens = self.call, self.call.chunks[index]
        assert call.sums is not None
        inputs = [kept.take().detach() for kept in self._inputs.pop()]
        for tensor in inputs:
            tensor.requires_grad_(tensor.is_floating_point())
        with (
            self._conditions[index].restored(),
            torch.enable_grad(),
            SumLinearGradients(call.sums.sums),
            call.last_output.learned(),
            recording_of(self._recorded) as records,
        ):
            given = tree_flatten(self._run(tokens, inputs))[0]
        dims = [dim for leaf, dim in zip(given, self._dims, strict=True) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in given if isinstance(leaf, Tensor)]
        if own and outputs[0].requires_grad:
            with torch.enable_grad():
                outputs[0] = BeginWith.apply(outputs[0], own)
            grads = (torch.empty_like(outputs[0]), *grads[1:])
        pairs = [
            (output, self.arguments.cut_along(dim, grad, tokens))
            for output, dim, grad in zip(outputs, dims, grads, strict=False)
            if grad is not None and output.requires_grad
        ]
        recorded = [tensor for tensors in records.values() for tensor in tensors]
        pairs += [
            (output, cut(grad, output, tokens, self.arguments.batch))
            for output, grad in zip(recorded, grads[len(outputs) :], strict=True)
            if grad is not None and output.requires_grad
        ]
        del given, outputs, recorded, records
        trained = call.sums.sums
        # By the hidden states always: operators that add to the sums have nothing else that they are differentiated by.
        asked = [True, *needs_inputs[1:]]
        wanted = [tensor for tensor, needed in zip(inputs, asked, strict=True) if needed]
        parts: Sequence[Tensor | None] = [None] * (len(wanted) + len(trained))
        if pairs:
            # The way back alone, without the values.
            results = [get_gradient_edge(output) for output, _ in pairs]
            d_results = [grad for _, grad in pairs]
            del pairs
            leaves = [*wanted, *self.parameters]
            with hooks_put_off(self.parameters):
                parts = torch.autograd.grad(results, leaves, d_results, allow_unused=True)
        for gradient, part in zip(trained, parts[len(wanted) :], strict=True):
            if part is not None:
                gradient.add(part)
        found = iter(parts)
        of_inputs = [next(found) if needed else None for needed in asked]
        return [grad if needed else None for grad, needed in zip(of_inputs, needs_inputs, strict=True)]

    def _put_gradients(self, d_inputs: list[Tensor | None], of_chunk: list[Tensor | None], tokens: slice) -> None:
        """Write a chunk's gradients where they belong, or add them where all chunks read the whole input."""
        for place, form in enumerate(self._forms):
            grad, of_chunk[place] = of_chunk[place], None
            whole, has_tokens = d_inputs[place], self.arguments.input_dim(place) is not None
            if grad is None:
                if whole is not None and has_tokens:
                    self.arguments.cut_input(place, whole, tokens).zero_()
                continue
            if len(self.call.chunks) == 1:
                d_inputs[place] = grad
                continue
            if whole is None:
                dtype = form.dtype if has_tokens else sum_dtype(form.dtype)
                whole = d_inputs[place] = torch.zeros(form.shape, dtype=dtype, device=grad.device)
            if not has_tokens:
                whole += grad
            else:
                self.arguments.cut_input(place, whole, tokens).copy_(grad)
            del grad


class _Other:
    """What a layer gives that is no tensor."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _LayerRun, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.num_inputs = len(tensors) - len(run.parameters)
        ctx.set_materialize_grads(False)
        return run.forward(tensors[: ctx.num_inputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Let go of with this backward, while the graph may live on.
        run, ctx.run = ctx.run, None
        if run is None:
            raise RuntimeError("a decoder layer cannot be differentiated a second time: compute the loss again")
        needs = ctx.needs_input_grad[1 : 1 + ctx.num_inputs]
        return None, *run.backward(grads, needs)
