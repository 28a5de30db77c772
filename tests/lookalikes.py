"""Modules that look like an MLP: some work token by token, some do not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from mst_ds.structure import probe

HIDDEN, INTERMEDIATE = 32, 48


class Mlp(nn.Module):
    """Llama's children under names that say nothing, in an order of their own."""

    def __init__(self, activation: nn.Module | None = None, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c = nn.Linear(INTERMEDIATE, HIDDEN, bias=bias)
        self.b = nn.Linear(HIDDEN, INTERMEDIATE)
        self.act = activation or nn.SiLU()
        self.a = nn.Linear(HIDDEN, INTERMEDIATE)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x)) * self.b(x))


# Token by token, but not what the chunked MLP computes.


class WithResidual(Mlp):
    def forward(self, x):
        return x + super().forward(x)


class WithScale(Mlp):
    def forward(self, x):
        return super().forward(x) * 0.9


class WithAScaleThatHardlyShows(Mlp):
    def forward(self, x):
        return super().forward(x) * (1 + 1e-6)


class ActivationOfTheProduct(Mlp):
    def forward(self, x):
        return self.c(self.act(self.a(x) * self.b(x)))


class WithClamp(Mlp):
    """Like GPT-OSS: only large values show it."""

    def forward(self, x):
        return self.c(self.act(self.a(x).clamp(max=7)) * self.b(x).clamp(min=-7, max=7))


class WithStoppedGradient(Mlp):
    """Computes the same values, and other gradients."""

    def forward(self, x):
        return self.c(self.act(self.a(x)) * self.b(x).detach())


class WithAnotherParameter(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((HIDDEN,), 2.0))
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return super().forward(x) * self.scale * self.factor


class WithProductInFp32(Mlp):
    """Rounds by the shape of its products: the whole and its chunks differ in the seventh digit."""

    def forward(self, x):
        gate = F.linear(x.float(), self.a.weight.float(), self.a.bias.float())
        return self.c(self.act(gate).to(x.dtype) * self.b(x))


class ThreeInOne(nn.Module):
    """Sizes that are sums and multiples of others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all, self.down = nn.Linear(HIDDEN, 3 * INTERMEDIATE), nn.Linear(INTERMEDIATE + HIDDEN, HIDDEN)

    def forward(self, x):
        gate, up, shift = self.all(x).chunk(3, dim=-1)
        return self.down(torch.cat([F.silu(gate) * up + shift, x], dim=-1))


class UpBeforeGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.both, self.down = nn.Linear(HIDDEN, 2 * INTERMEDIATE), nn.Linear(INTERMEDIATE, HIDDEN)
        self.act = nn.SiLU()

    def forward(self, x):
        up, gate = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class WithBuffer(nn.Module):
    """An activation that is more than a function."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slope", torch.tensor(0.3))

    def forward(self, x):
        return F.leaky_relu(x, 0.1) * self.slope


def with_own_linear():
    mlp = Mlp()
    mlp.a = OwnLinear(HIDDEN, INTERMEDIATE)
    return mlp


def with_weight_norm():
    mlp = Mlp()
    parametrizations.weight_norm(mlp.a)
    return mlp


TOKENWISE = {
    "residual": WithResidual,
    "scale": WithScale,
    "a scale that hardly shows": WithAScaleThatHardlyShows,
    "activation of the product": ActivationOfTheProduct,
    "clamp": WithClamp,
    "stopped gradient": WithStoppedGradient,
    "product in fp32": WithProductInFp32,
    "three in one": ThreeInOne,
    "other parameters": WithAnotherParameter,
    "up before gate": UpBeforeGate,
    "activation with parameters": lambda: Mlp(nn.PReLU()),
    "activation with a buffer": lambda: Mlp(WithBuffer()),
    "activation in place": lambda: Mlp(nn.ReLU(inplace=True)),
    "a linear class of its own": with_own_linear,
    "weight norm": with_weight_norm,
}


class WithDropout(Mlp):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.4, training=self.training)


class WithDropoutModule(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.4)

    def forward(self, x):
        return self.c(self.dropout(self.act(self.a(x)) * self.b(x)))


DROPOUTS = {"function": WithDropout, "module": WithDropoutModule}


# Not token by token, or not to be told apart from that.


class WithOptionalArgument(Mlp):
    """An MLP, as long as it is called with tokens only."""

    def forward(self, x, residual=None):
        return super().forward(x) + (0 if residual is None else residual)


class WithTwoOutputs(Mlp):
    def forward(self, x):
        return super().forward(x), None


class WithAnotherArgument(Mlp):
    def forward(self, x, residual):
        return super().forward(x) + residual


class MinusTheBatchMean(Mlp):
    """With one row it would give 0 for everything."""

    def forward(self, x):
        return super().forward(x) - x.mean(0, keepdim=True) / 2


class TimesASoftmaxOverRows(Mlp):
    """With one row it would be 1."""

    def forward(self, x):
        return super().forward(x) * x.softmax(dim=0)


class OverTheLength(Mlp):
    def forward(self, x):
        return super().forward(x) / x.shape[1]


class WithTheTokenBefore(Mlp):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 0, 1, 0))[:, :-1])


class WithATokenFarBefore(Mlp):
    def forward(self, x):
        return super().forward(x) + F.pad(x, (0, 0, 32, 0))[:, : x.shape[1]]


class ScaledByTheLargest(Mlp):
    """As quantisation by tensor."""

    def forward(self, x):
        return super().forward(x / x.abs().max())


class WithAMeanThatHasOnlyAGradient(Mlp):
    """In value token by token."""

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        return super().forward(x) + mean - mean.detach()


class WithBatchNorm(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)

    def forward(self, x):
        return super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2))


class WithLayerDrop(Mlp):
    """Seldom random."""

    def forward(self, x):
        return super().forward(x) * float(torch.rand(()) > 1e-3)


class WritesToItsInput(Mlp):
    def forward(self, x):
        return super().forward(x.mul_(0.5))


class CountsItsCalls(Mlp):
    """Tokens of a chunk see how many chunks came before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


def with_forward_of_the_instance():
    mlp = Mlp()
    original = mlp.forward
    mlp.forward = lambda x: 2 * original(x)
    return mlp


def with_forward_of_a_linear():
    mlp = Mlp()
    original = mlp.a.forward
    mlp.a.forward = lambda x: 2 * original(x)
    return mlp


def with_hook():
    mlp = Mlp()
    mlp.a.register_forward_hook(lambda module, args, output: 2 * output)
    return mlp


def with_backward_hook():
    mlp = Mlp()
    mlp.a.register_full_backward_hook(lambda module, grads, _: tuple(2 * grad for grad in grads))
    return mlp


def with_old_weight_norm():
    mlp = Mlp()
    mlp.a = weight_norm(mlp.a)
    return mlp


MIXING = {
    "two outputs": WithTwoOutputs,
    "another argument": WithAnotherArgument,
    "batch mean": MinusTheBatchMean,
    "softmax over rows": TimesASoftmaxOverRows,
    "over the length": OverTheLength,
    "the token before": WithTheTokenBefore,
    "a token far before": WithATokenFarBefore,
    "scaled by the largest": ScaledByTheLargest,
    "a mean that has only a gradient": WithAMeanThatHasOnlyAGradient,
    "batch norm": WithBatchNorm,
    "batch norm as activation": lambda: Mlp(nn.BatchNorm1d(probe.LENGTH, affine=False)),
    "layer drop": WithLayerDrop,
    "random activation": lambda: Mlp(nn.RReLU()),
    "activation over the tokens": lambda: Mlp(nn.Softmax(dim=-2)),
    "writes to its input": WritesToItsInput,
    "counts its calls": CountsItsCalls,
    "forward of the instance": with_forward_of_the_instance,
    "forward of a linear": with_forward_of_a_linear,
    "hook": with_hook,
    "backward hook": with_backward_hook,
    "weight norm by a hook": with_old_weight_norm,
}
