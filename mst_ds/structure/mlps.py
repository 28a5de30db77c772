"""Finds what of a decoder layer can be chunked by tokens: its MLP or its experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mst_ds.minisequence import ExpertEnds, KeptProjections, ParameterSums, chunked_experts, chunked_mlp
from mst_ds.structure import probe
from mst_ds.structure.layers import decoder_layers
from mst_ds.structure.mixers import is_attention, is_mixer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Linear(Protocol):
    """torch's linear layer, or GPT-2's Conv1D."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class MlpStructure:
    """A module that computes `down(activation(gate(x)) * up(x))`, or without a gate `down(activation(up(x)))`.

    gate_in_up, transposed, is_silu: as `chunked_mlp` has them.
    """

    module: nn.Module
    gate: Linear | None
    up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor]
    gate_in_up: bool = False
    transposed: bool = False
    is_silu: bool = False

    def run(
        self,
        chunks: int,
        hidden_states: Tensor,
        *,
        keep: bool | KeptProjections = False,
        sums: ParameterSums | None = None,
        skips_output: bool = False,
    ) -> Tensor:
        """The module's output, computed by the chunked operator."""
        gate, up, down = self.gate, self.up, self.down
        return chunked_mlp(
            hidden_states,
            gate.weight if gate is not None else None,
            up.weight,
            down.weight,
            chunks=chunks,
            activation=self.activation,
            is_silu=self.is_silu,
            gate_bias=gate.bias if gate is not None else None,
            up_bias=up.bias,
            down_bias=down.bias,
            gate_in_up=self.gate_in_up,
            transposed=self.transposed,
            keep=keep,
            sums=sums,
            skips_output=skips_output,
        )

    def formula(self, hidden_states: Tensor) -> Tensor:
        """The same in plain torch: what a module has to compute to be one."""

        def project(linear: Linear, x: Tensor) -> Tensor:
            return F.linear(x, linear.weight.t() if self.transposed else linear.weight, linear.bias)

        up = project(self.up, hidden_states)
        if self.gate_in_up:
            gate, up = up.chunk(2, dim=-1)
            product = self.activation(gate) * up
        elif self.gate is not None:
            product = self.activation(project(self.gate, hidden_states)) * up
        else:
            product = self.activation(up)
        return project(self.down, product)


@dataclass(frozen=True)
class ExpertsStructure:
    """Experts with the attributes of transformers' experts interface: `gate_up_proj` or `up_proj`, `down_proj`.

    gate: from a chunk's output of the first to the input of the second.
    transposed: as `chunked_experts` has it.
    """

    module: nn.Module
    gate: Callable[[Tensor], Tensor]
    transposed: bool

    @classmethod
    def of(cls, module: Any) -> ExpertsStructure:
        """Read the attributes, whatever the module computes."""
        has_gate = hasattr(module, "gate_up_proj")
        return cls(module, module._apply_gate if has_gate else module.act_fn, bool(module.is_transposed))

    def run(
        self,
        chunks: int,
        hidden_states: Tensor,
        expert_index: Tensor,
        expert_weights: Tensor,
        *,
        ends: ExpertEnds | None = None,
        sums: ParameterSums | None = None,
        skips_output: bool = False,
    ) -> Tensor:
        """The module's output, computed by the chunked operator."""
        up, down, up_bias, down_bias = self.parameters()
        return chunked_experts(
            hidden_states,
            expert_index,
            expert_weights,
            up,
            down,
            chunks=chunks,
            gate=self.gate,
            up_bias=up_bias,
            down_bias=down_bias,
            transposed=self.transposed,
            ends=ends,
            sums=sums,
            skips_output=skips_output,
        )

    def formula(self, hidden_states: Tensor, expert_index: Tensor, expert_weights: Tensor) -> Tensor:
        """The same in plain torch: what a module has to compute to be one."""
        up, down, up_bias, down_bias = self.parameters()
        output = torch.zeros_like(hidden_states)
        for expert in range(len(up)):
            tokens, places = (expert_index == expert).nonzero(as_tuple=True)
            weights = (up[expert].t(), down[expert].t()) if self.transposed else (up[expert], down[expert])
            biases = (bias[expert] if bias is not None else None for bias in (up_bias, down_bias))
            (up_weight, down_weight), (of_up, of_down) = weights, biases
            result = F.linear(self.gate(F.linear(hidden_states[tokens], up_weight, of_up)), down_weight, of_down)
            output = output.index_add(0, tokens, result * expert_weights[tokens, places, None])
        return output

    def parameters(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Up and down weight of all experts, and their biases."""
        module: Any = self.module
        up = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
        biases = getattr(module, f"{up}_bias", None), getattr(module, "down_proj_bias", None)
        return getattr(module, up), module.down_proj, *biases


@dataclass(frozen=True)
class TokenwiseStructure:
    """Any other module with weights whose output for a token depends on that token alone.

    num_inputs: with how many tensors it was seen to do so.
    """

    module: nn.Module
    num_inputs: int


Chunkable: TypeAlias = MlpStructure | ExpertsStructure | TokenwiseStructure


def find_mlps(model: PreTrainedModel, *, required: bool) -> list[Chunkable]:
    """What computes token by token in each decoder layer: its MLP, or its experts and the MLP beside them.

    Each candidate is checked by running its own forward on stand-ins of a few elements, in fp64: what merely looks like
    an MLP is not taken for one. Weights are not read, so ZeRO-3 need not gather them. A router is left alone, because
    its logits make a loss of their own.

    Args:
        required: raise where a decoder layer cannot be chunked; otherwise the model's MLPs are then left as they are.

    Raises:
        ValueError: `required`, and a layer that cannot be chunked.
    """
    found: list[Chunkable] = []
    only_mixing = 0
    names = {module: name for name, module in model.named_modules()}
    hidden_size = model.config.get_text_config().hidden_size
    with probe.isolated_rng():
        for layer in decoder_layers(model):
            chunkable = _find_in(layer, hidden_size)
            if chunkable:
                found += chunkable
            elif chunkable is not None and _only_mixes(layer):
                only_mixing += 1
            elif required:
                raise ValueError(
                    f"{type(model).__name__}: {names[layer]} has no MLP that can be chunked exactly (linear layers and "
                    'an activation, or experts); set "mlp_chunks": 1 in the "mst" block to train it with its own MLP'
                )
            else:
                return []
    if required and not found and not only_mixing:
        raise ValueError(
            f'{type(model).__name__} has no decoder layers with an MLP; set "mlp_chunks": 1 in the "mst" block'
        )
    return found


def _only_mixes(layer: nn.Module) -> bool:
    """Whether all that could be an MLP in it is attention or another mixer."""
    inside = [child for child in layer.children() if _has_two_projections(child)]
    return bool(inside) and all(is_mixer(child) or is_attention(child) for child in inside)


def is_tokenwise(module: nn.Module, hidden_size: int) -> bool:
    """Whether `module` maps (B, L, H) to a tensor, token by token, in training, but for its dropout."""
    if probe.is_changed_by_user(module):
        return False
    return any(
        _computes_in_chunks(small, probe.random_tensor(probe.ROWS, probe.LENGTH, hidden))
        for small, hidden in probe.miniatures(module, hidden_size)
    )


def _find_in(parent: nn.Module, hidden_size: int) -> list[Chunkable] | None:
    """What of `parent` can be chunked; None where something in it should be and cannot."""
    found: list[Chunkable] = []
    for child in parent.children():
        if is_mixer(child):
            continue
        if _holds_experts(child):
            experts = _as_experts(child, hidden_size)
            inside = [experts] if experts is not None else _find_in(child, hidden_size)
            if not inside:
                return None
            found += inside
        elif (mlp := _as_mlp(child)) is not None:
            found.append(mlp)
        elif _has_two_projections(child) and is_tokenwise(child, hidden_size):
            found.append(TokenwiseStructure(child, 1))
    return found


def _holds_experts(module: nn.Module) -> bool:
    # Weights of all experts in one tensor: (experts, outputs, inputs) or (experts, inputs, outputs).
    return any(
        len(probe.shape_of(parameter)) == 3
        for child in module.modules()
        if not isinstance(child, nn.Conv1d)
        for parameter in child.parameters(recurse=False)
    )


def _as_experts(module: nn.Module, hidden_size: int) -> ExpertsStructure | TokenwiseStructure | None:
    """Whether `module` maps hidden states (T, H), experts (T, k) and their weights (T, k) to (T, H), token by token."""
    if probe.is_changed_by_user(module):
        return None
    for small, hidden in probe.miniatures(module, hidden_size):
        num_experts = next(len(parameter) for parameter in small.parameters() if parameter.dim() == 3)
        scores, index = _routes(num_experts)
        inputs = probe.small_and_large_tokens(probe.TOKENS, hidden), index, scores

        def formula(*inputs: Tensor, small: nn.Module = small) -> Tensor:
            return ExpertsStructure.of(small).formula(*inputs)

        forward = functools.partial(type(small).forward, small)
        if not _computes_in_chunks(small, *inputs):
            continue
        if probe.is_same(formula, forward, inputs, list(small.parameters())) and _has_pure_gate(small):
            return ExpertsStructure.of(module)
        return TokenwiseStructure(module, len(inputs))
    return None


def _has_pure_gate(module: Any) -> bool:
    experts = ExpertsStructure.of(module)
    up_weight = experts.parameters()[0]
    return _is_pure(experts.gate, up_weight.shape[2 if experts.transposed else 1])


def _routes(num_experts: int) -> tuple[Tensor, Tensor]:
    """Weights and experts of each token, (T, 2). All have one expert in common, so that one that drops tokens shows."""
    scores = torch.rand(probe.TOKENS, num_experts, dtype=torch.float64, device="cpu")
    scores[:, 0] += 1
    routes: tuple[Tensor, Tensor] = scores.topk(min(2, num_experts))
    return routes


def _computes_in_chunks(small: nn.Module, *inputs: Tensor) -> bool:
    """Whether `small` gives for chunks of tokens, taken over all rows, what it gives for the whole."""
    parameters = list(small.parameters())

    def whole(*inputs: Tensor) -> Tensor:
        with probe.WithoutDropout():
            output: Tensor = type(small).forward(small, *inputs)
        return output

    def in_two_chunks(*inputs: Tensor) -> Tensor:
        rows = [tensor.reshape(*(1,) * (tensor.dim() - 2), -1, tensor.shape[-1]) for tensor in inputs]
        count = rows[0].shape[-2] // 2
        chunks = zip(*(tensor.split([count, tensor.shape[-2] - count], dim=-2) for tensor in rows), strict=True)
        output = torch.cat([whole(*chunk) for chunk in chunks], dim=-2)
        return output.view(*inputs[0].shape[:-1], -1)

    # A norm inside may be in fp32 in any model.
    return probe.is_same(in_two_chunks, whole, inputs, parameters, tolerance=1e-5)


def _has_two_projections(module: nn.Module) -> bool:
    """Not a norm, nor a single projection: nothing wider than the hidden size would be kept from living."""
    return sum(len(probe.shape_of(parameter)) == 2 for parameter in module.parameters()) >= 2


def _as_mlp(module: nn.Module) -> MlpStructure | None:
    if probe.is_changed_by_user(module):
        return None
    children: dict[str, Any] = dict(module.named_children())
    for linear_class, transposed in ((nn.Linear, False), (_conv1d(), True)):
        linears = [name for name, child in children.items() if type(child) is linear_class]
        others = [child for name, child in children.items() if name not in linears and not _is_inert(child)]
        if len(linears) not in (2, 3) or len(others) != 1 or _has_state(module, others[0]):
            continue
        for gate_in_up in (False, True) if len(linears) == 2 else (False,):
            for names in permutations(linears):
                roles = dict(zip(("gate", "up", "down") if len(names) == 3 else ("up", "down"), names, strict=True))
                parts = {role: children[name] for role, name in roles.items()}
                mlp = MlpStructure(
                    module, parts.get("gate"), parts["up"], parts["down"], others[0], gate_in_up, transposed
                )
                if _computes_mlp(mlp, roles):
                    return replace(mlp, is_silu=_is_silu(others[0]))
    return None


def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def _has_state(module: nn.Module, activation: nn.Module) -> bool:
    """Whether there is more than the linear layers' weights: the operator knows of nothing else."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return bool([*tensors, *activation.parameters(), *activation.buffers()])


def _is_inert(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _computes_mlp(mlp: MlpStructure, roles: dict[str, str]) -> bool:
    """Whether the module's own forward, with small linear layers in these roles, gives what the formula gives."""
    stand_ins: dict[str, Any] = {}
    for role, name in roles.items():
        inputs, outputs = probe.HIDDEN, probe.INTERMEDIATE
        if role == "down":
            inputs, outputs = outputs, inputs
        elif mlp.gate_in_up:
            outputs *= 2
        bias = getattr(mlp, role).bias is not None
        stand_ins[name] = _small_linear(inputs, outputs, bias=bias, transposed=mlp.transposed)
    small = {role: stand_ins[name] for role, name in roles.items()}
    x = probe.small_and_large_tokens(probe.ROWS, probe.LENGTH, probe.HIDDEN)
    candidate = MlpStructure(
        mlp.module, small.get("gate"), small["up"], small["down"], mlp.activation, mlp.gate_in_up, mlp.transposed
    )
    stand_in = probe.with_stand_ins(mlp.module, stand_ins)
    parameters = [parameter for linear in stand_ins.values() for parameter in linear.parameters()]
    forward = functools.partial(type(stand_in).forward, stand_in)
    return (
        probe.is_same(candidate.formula, forward, [x], parameters)
        and _is_pure(mlp.activation, probe.INTERMEDIATE)
        and _computes_in_chunks(stand_in, x)
    )


def _is_pure(activation: Callable[[Tensor], Tensor], width: int) -> bool:
    """Whether it leaves its input as it is: the operators need it again."""
    return probe.attempt(activation, probe.small_and_large_tokens(probe.TOKENS, width)) is not None


def _is_silu(activation: Callable[[Tensor], Tensor]) -> bool:
    x = probe.small_and_large_tokens(probe.TOKENS, probe.INTERMEDIATE)
    return torch.allclose(activation(x), F.silu(x), rtol=1e-12, atol=0)


def _small_linear(inputs: int, outputs: int, *, bias: bool, transposed: bool) -> nn.Module:
    if not transposed:
        return nn.Linear(inputs, outputs, bias=bias, device="cpu", dtype=torch.float64)
    with torch.device("cpu"):
        linear = _conv1d()(outputs, inputs).double()
    # As initialised its bias is 0, which would hide it.
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    return linear
