"""Which linear layers read the same tensor and so are computed together, such as q, k and v."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn


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
    groups = [named.get(module, (module,)) for module in shapes if module not in others]
    return tuple(
        ModuleGroup(
            group, shapes[group[0]].in_features, tuple(shapes[m].out_features for m in group)
        )
        for group in groups
    )


@dataclass(frozen=True, slots=True, eq=False)
class ModuleCall:
    """Of a module. Holds its tensors, so that no other gets their identity."""

    name: str
    module: nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    output: Any
    input_version: int  # of the first argument; 0 where that is no tensor
    output_version: int  # as `input_version`


def read_together(calls: Sequence[ModuleCall]) -> list[tuple[str, ...]]:
    """Siblings called one after the other with the same tensor, each once in the pass. A layer
    whose output the model then changes in place stays alone: parts of one tensor must not be.
    """
    linear = [call for call in calls if isinstance(call.module, nn.Linear)]
    count = Counter(call.name for call in linear)
    fit = [
        call
        for call in linear
        if count[call.name] == 1 and call.output._version == call.output_version
    ]
    runs = [[c.name for c in run] for _, run in itertools.groupby(fit, _shared)]
    return [tuple(run) for run in runs if len(run) > 1]


def _shared(call: ModuleCall) -> tuple[object, ...]:
    """What a linear layer must share with another to be computed with it."""
    parent, weight = call.name.rpartition(".")[0], call.module.weight
    kind = weight.dtype, weight.device, call.module.bias is None
    return parent, id(call.arguments[0]), call.input_version, *kind


@contextmanager
def watching(model: nn.Module) -> Iterator[list[ModuleCall]]:
    """Notes the calls of every module meanwhile, in the order of their ends."""
    calls: list[ModuleCall] = []

    def note(
        name: str, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any
    ) -> None:
        ends = inputs[0] if inputs else None, output
        versions = [getattr(value, "_version", 0) for value in ends]
        calls.append(ModuleCall(name, module, inputs, options, output, *versions))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(partial(note, name), with_kwargs=True))
        yield calls
