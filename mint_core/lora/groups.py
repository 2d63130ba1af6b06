"""Which linear layers read the same tensor and so are computed together, such as q, k and v."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Of an nn.Linear."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, eq=False)
class ModuleGroup:
    """Linear layers of one input, in the order in which the model calls them; often one alone."""

    modules: tuple[str, ...]  # full names
    in_features: int
    out_features: tuple[int, ...]  # of each

    @property
    def width(self) -> int:
        """Columns of all outputs side by side."""
        return sum(self.out_features)

    @property
    def columns(self) -> list[slice]:
        """Each module's."""
        ends = itertools.accumulate(self.out_features)
        return [slice(end - size, end) for end, size in zip(ends, self.out_features, strict=True)]


def complete(
    shapes: Mapping[str, LinearShape], runs: Iterable[tuple[str, ...]] = ()
) -> tuple[ModuleGroup, ...]:
    """Every linear layer in one group: those of a run together, the others alone."""
    named = {modules[0]: modules for modules in runs}
    others = {module for modules in named.values() for module in modules[1:]}
    return tuple(
        ModuleGroup(
            modules,
            shapes[module].in_features,
            tuple(shapes[member].out_features for member in modules),
        )
        for module in shapes
        if module not in others
        for modules in [named.get(module, (module,))]
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """Of a linear layer. Holds its tensors, so that no other gets their identity."""

    module: str
    key: tuple[object, ...]  # what a layer must share with another to be computed with it
    input: Tensor
    output: Tensor
    output_version: int


def read_together(calls: Sequence[_Call]) -> list[tuple[str, ...]]:
    """Siblings called one after the other with the same tensor, each once in the pass. A layer
    whose output the model then changes in place stays alone: parts of one tensor must not be.
    """
    names = [call.module for call in calls]
    fit = [
        call
        for call in calls
        if names.count(call.module) == 1 and call.output._version == call.output_version
    ]
    runs = [[c.module for c in run] for _, run in itertools.groupby(fit, lambda c: c.key)]
    return [tuple(run) for run in runs if len(run) > 1]


@contextmanager
def watching(model: nn.Module) -> Iterator[list[_Call]]:
    """Notes the calls of every nn.Linear meanwhile."""
    calls: list[_Call] = []

    def note(name: str, module: nn.Linear, inputs: tuple[Any, ...], output: Tensor) -> None:
        parent, x, weight = name.rpartition(".")[0], inputs[0], module.weight
        key = parent, id(x), x._version, weight.dtype, weight.device, module.bias is None
        calls.append(_Call(name, key, x, output, output._version))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                hooks.enter_context(module.register_forward_hook(partial(note, name)))
        yield calls
