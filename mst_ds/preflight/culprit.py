"""Which module is the first to differ."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mst_ds.preflight.compare import Outcome, head_name
from mst_ds.preflight.errors import is_exact, relative_error
from mst_ds.preflight.trace import ModuleRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Culprit:
    """The module to look into, and what of it is off by how much (relative)."""

    module: str
    what: str
    error: float

    def __str__(self) -> str:
        return f"{self.module}: {self.what} is off by {self.error:.1e} (relative)"


def find_culprit(model: PreTrainedModel, reference: Outcome, actual: Outcome) -> Culprit | None:
    """The first module, in the order of the computation, whose result is wrong although what it got is right.

    First the outputs, from the input on; where they agree the loss; where that agrees the gradients, from the loss
    back. None where two traced runs agree in everything.
    """
    assert reference.trace is not None
    assert actual.trace is not None
    modules = {
        name: _Comparison(record, actual.trace[name])
        for name, record in reference.trace.items()
        if name in actual.trace
    }
    return (
        _first_output(modules)
        or _loss(head_name(model), reference, actual)
        or _gradient(model, modules, reference, actual)
    )


@dataclass(frozen=True)
class _Comparison:
    """The errors of one module; None where the two have nothing to compare."""

    reference: ModuleRecord
    actual: ModuleRecord

    def error(self, field: str) -> float | None:
        expected, actual = getattr(self.reference, field), getattr(self.actual, field)
        if expected is None or actual is None or expected.shape != actual.shape:
            return None
        return relative_error(actual, expected)

    @property
    def has_output(self) -> bool:
        """Whether the outputs can be compared."""
        return self.error("output") is not None

    def differs(self, field: str) -> bool:
        error = self.error(field)
        return error is not None and not is_exact(error)

    def agrees(self, field: str) -> bool:
        error = self.error(field)
        return error is not None and is_exact(error)


def _first_output(modules: Mapping[str, _Comparison]) -> Culprit | None:
    name = next((name for name, module in modules.items() if module.differs("output")), None)
    if name is None:
        return None
    error = modules[name].error("output")
    # What came in was wrong already where the module around it computes without a module, as attention does.
    while modules[name].differs("input") and (outer := _around(name, modules)) is not None:
        name = outer
    error = modules[name].error("output") or error
    assert error is not None
    return Culprit(name, "its output", error)


def _loss(head: str, reference: Outcome, actual: Outcome) -> Culprit | None:
    if is_exact(actual.loss_error(reference)):
        return None
    assert reference.cross_entropy is not None
    if actual.cross_entropy is not None:
        error = relative_error(actual.cross_entropy, reference.cross_entropy)
        if is_exact(error):
            return Culprit("router", "its part of the loss", actual.loss_error(reference))
    return Culprit(head, "its loss", actual.loss_error(reference))


def _gradient(
    model: PreTrainedModel, modules: Mapping[str, _Comparison], reference: Outcome, actual: Outcome
) -> Culprit | None:
    head = head_name(model)
    found: dict[str, Culprit] = {}
    for name, module in modules.items():
        error = module.error("input_gradient")
        if error is not None and not is_exact(error) and (module.agrees("output_gradient") or name == head):
            found[name] = Culprit(name, "the gradient of its input", error)
    wrong = {name: error for name, error in actual.gradient_errors(reference).items() if not is_exact(error)}
    comparable = {name for name, module in modules.items() if module.has_output or name == head}
    for name, error in wrong.items():
        owners = {owner: place for place in _places(model, name) if (owner := _around(place, comparable)) is not None}
        # A tied weight gets gradients in several places: one that came in wrong explains it.
        if any(modules[owner].differs("output_gradient") for owner in owners):
            continue
        for owner, place in owners.items():
            found.setdefault(owner, Culprit(owner, f"the gradient of its {place[len(owner) + 1 :]}", error))
    # An outer module differs because of the one inside it. Of several the last: the backward comes to it first.
    innermost = [name for name in modules if name in found and not any(other.startswith(f"{name}.") for other in found)]
    if innermost:
        return found[innermost[-1]]
    return next((Culprit(name, "its gradient", error) for name, error in wrong.items()), None)


def _around(name: str, modules: Container[str]) -> str | None:
    """The innermost of `modules` that contains the module or parameter `name`."""
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            return name
    return None


def _places(model: PreTrainedModel, name: str) -> list[str]:
    """All names of a parameter: a tied one has several."""
    parameter = model.get_parameter(name)
    return [other for other, tensor in model.named_parameters(remove_duplicate=False) if tensor is parameter]
