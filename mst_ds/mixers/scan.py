"""Scans over the tokens of each head: recurrences whose state begins anew with each document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mst_ds.geometry import HeadLayout
from mst_ds.sequence_parallel import SequenceGroup

from .exchange import gather_heads, scatter_heads
from .sequence import MixedSequence

Given = dict[str, Any]
Mixed = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Scan:
    """How transformers calls a scan, by the names of its arguments, and what each has.

    Args:
        arguments: of those without a name, in their order.
        by_head: tokens and heads, (B, L, N, ...); the first is one.
        by_group: tokens and groups of as many heads each, (B, L, K, ...).
        by_token: tokens, for all heads alike, (B, ..., L).
        of_heads: heads and no tokens, (N, ...).
        initial: the state to begin with, (B, N, ...); none where a scan cannot begin with one.
        final: whether to give the last state, too; none where it is always given.
        gives_state: whether it gives the output and the last state, or None in its place, without being asked to.
        has_heads_first: tokens come last instead, (B, N, L).
    """

    arguments: tuple[str, ...]
    by_head: tuple[str, ...]
    by_group: tuple[str, ...] = ()
    by_token: tuple[str, ...] = ()
    of_heads: tuple[str, ...] = ()
    initial: str = ""
    final: str = ""
    gives_state: bool = False
    has_heads_first: bool = False

    def __call__(self, sequence: MixedSequence, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `original` gives for each document of the sequence alone, whole on the rank that has the head.

        Returns:
            the output, as `by_head`, of this shard, with None for the last state where it comes along.

        Raises:
            ValueError: fewer heads than ranks, or a state that goes in or out.
        """
        given: Given = dict(zip(self.arguments, args, strict=False)) | kwargs
        if any(given.get(name) is not None and given[name] is not False for name in (self.initial, self.final)):
            raise ValueError(
                f"a layer hands a state to {original.__name__} or asks for its last one, which a plan does not keep: "
                "call it without a cache"
            )
        call, carried = sequence.call, sequence.carried()

        def run(of_document: Given, state: Tensor | None) -> Mixed:
            positional = [of_document[name] for name in self.arguments[: len(args)]]
            keywords = {name: of_document[name] for name in kwargs}
            if carried is not None:
                keywords |= {self.initial: state} | ({self.final: True} if self.final else {})
            output = original(*positional, **keywords)
            return output[:2] if isinstance(output, tuple) else (output, None)

        def mixed(given: Given) -> Tensor:
            if call is None or carried is None:
                return self._by_document(sequence, given, run, None)[0]
            output, last = self._by_document(sequence, given, run, carried.enter(call, given[self.by_head[0]]))
            assert last is not None
            return carried.leave(call, output, last)

        if sequence.group is None:
            output = mixed(given)
        else:
            layout = self._layout(given, original.__name__, sequence.group)
            of_heads = mixed(self._gathered(given, layout, sequence.group))
            output = self._scattered(of_heads, layout, sequence.group)
        return (output, None) if self.gives_state else output

    @property
    def _token_dim(self) -> int:
        return 2 if self.has_heads_first else 1

    def _heads(self, tensor: Tensor) -> int:
        return tensor.shape[3 - self._token_dim]

    def _with_tokens(self, given: Given) -> dict[str, int]:
        """The dimension of tokens of each argument that has them."""
        of_heads = [name for name in (*self.by_head, *self.by_group) if given.get(name) is not None]
        return dict.fromkeys(of_heads, self._token_dim) | {name: given[name].dim() - 1 for name in self.by_token}

    def _by_document(
        self, sequence: MixedSequence, given: Given, run: Callable[[Given, Tensor | None], Mixed], state: Tensor | None
    ) -> Mixed:
        """`run` for one document after another, of rows with the same documents together.

        Args:
            state: of the chunk before, with which a document begins that goes on; None in the first.

        Returns:
            the output, and the last states of all rows.
        """
        first = given[self.by_head[0]]
        batch, length = first.shape[0], first.shape[self._token_dim]
        tokens = sequence.stretch(length // sequence.ranks)
        continued = [state is not None and goes_on for goes_on in sequence.continued(batch, tokens)]
        if sequence.documents.within(tokens).are_rows and len(set(continued)) == 1:
            return run(given, state if continued[0] else None)
        dims = self._with_tokens(given)
        rows = sequence.rows(batch, tokens)
        # Split, not cut: the gradient of a split is put together once.
        counts = [count for count, _ in rows]
        of_rows = {name: iter(given[name].split(counts)) for name in dims}
        states = [None] * len(rows) if state is None else state.split(counts)
        outputs, last = [], []
        for (_, lengths), of_rows_before, goes_on in zip(rows, states, continued[:: counts[0]], strict=True):
            parts = [next(of_rows[name]).split(lengths, dim=dim) for name, dim in dims.items()]
            before = of_rows_before if goes_on else None
            of_documents = []
            for of_document in zip(*parts, strict=True):
                output, left = run(given | dict(zip(dims, of_document, strict=True)), before)
                of_documents.append(output)
                before = None
            outputs.append(torch.cat(of_documents, dim=self._token_dim))
            last += [] if left is None else [left]
        return torch.cat(outputs), torch.cat(last) if last else None

    def _layout(self, given: Given, name: str, group: SequenceGroup) -> HeadLayout:
        heads = self._heads(given[self.by_head[0]])
        groups = self._heads(given[self.by_group[0]]) if self.by_group else heads
        if group.size > heads:
            raise ValueError(
                f"sp_size is {group.size}, and {name} has {heads} heads to divide; allowed: at most {heads}"
            )
        return HeadLayout(heads, groups, group.size)

    def _gathered(self, given: Given, layout: HeadLayout, group: SequenceGroup) -> Given:
        """The arguments of this rank's heads over the whole sequence."""
        dims = self._with_tokens(given)
        tensors = [self._heads_first(given[name]) for name in dims]
        ranges = [[self._range(name, given[name], layout, rank) for name in dims] for rank in range(group.size)]
        found = gather_heads(tensors, ranges, group)
        gathered = dict(given)
        index = layout.key_value_index(group.rank)
        for name, tensor in zip(dims, found, strict=True):
            # Where plain groups do not say which one a head reads.
            is_copied = name in self.by_group and index is not None
            of_heads = tensor[:, torch.tensor(index, device=tensor.device)] if is_copied else tensor
            gathered[name] = self._as_given(of_heads, given[name])
        mine = layout.query_heads(group.rank)
        for name in self.of_heads:
            if given.get(name) is not None:
                gathered[name] = given[name][mine.start : mine.stop]
        return gathered

    def _range(self, name: str, tensor: Tensor, layout: HeadLayout, rank: int) -> range:
        if name in self.by_token:
            return range(tensor.shape[1])
        return layout.key_value_heads(rank) if name in self.by_group else layout.query_heads(rank)

    def _heads_first(self, tensor: Tensor) -> Tensor:
        """(B, N, L, D), D of one element where it has none."""
        by_heads = tensor if self.has_heads_first else tensor.transpose(1, 2)
        return by_heads.flatten(3) if by_heads.dim() > 3 else by_heads.unsqueeze(3)

    def _as_given(self, tensor: Tensor, given: Tensor) -> Tensor:
        by_heads = tensor.unflatten(3, given.shape[3:]) if given.dim() > 3 else tensor.squeeze(3)
        return by_heads if self.has_heads_first else by_heads.transpose(1, 2)

    def _scattered(self, output: Tensor, layout: HeadLayout, group: SequenceGroup) -> Tensor:
        heads = [layout.query_heads(rank) for rank in range(group.size)]
        of_shard = scatter_heads(self._heads_first(output), heads, group)
        return self._as_given(of_shard, output).contiguous()


_DELTA_RULE = Scan(
    arguments=("query", "key", "value", "g", "beta"),
    by_head=("value", "g", "beta"),
    by_group=("query", "key"),
    initial="initial_state",
    final="output_final_state",
    gives_state=True,
)

SCANS: Mapping[str, Scan] = {
    "torch_chunk_gated_delta_rule": _DELTA_RULE,
    "chunk_kimi_delta_attention": _DELTA_RULE,
    "mamba2_chunk_scan": Scan(
        arguments=("hidden_states", "dt", "A", "B", "C"),
        by_head=("hidden_states", "dt", "z"),
        by_group=("B", "C"),
        of_heads=("A", "D", "dt_bias"),
        initial="initial_states",
        final="return_final_states",
    ),
    "mamba_selective_scan": Scan(
        arguments=("hidden_states", "dt", "A", "B", "C"),
        by_head=("hidden_states", "dt", "z"),
        by_token=("B", "C"),
        of_heads=("A", "D", "delta_bias"),
        final="return_last_state",
        has_heads_first=True,
    ),
}
