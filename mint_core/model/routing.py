"""Which experts tokens go to: as the routers of their layers choose, or as a request says.

Routers are transformers' own modules, frozen, and computed on a CPU over a multiple of ROUTED_ROWS
rows: torch computes what is left of a vector otherwise, and so a token's scores by its neighbours.
So are linear layers of one column beside them, which say how much a shared expert counts.

T: tokens. L: layers that have experts. k: experts of each token. E: experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mint_core.lora.groups import LinearShape
from mint_core.lora.products.onednn import Product
from mint_core.lora.products.packed import Packing
from mint_core.model import experts
from mint_core.model.experts import Experts

ROUTED_ROWS = 32  # as many as the widest vectors hold float32, twice
GATE_COLUMNS = 16
ROUTER_NAMES = ("gate", "router")
ROUTERS_CHOICE = -1


@dataclass(frozen=True, slots=True)
class RoutedLayer:
    """The names of the parts of a layer that has experts."""

    experts: str
    router: str
    gates: tuple[str, ...]  # of shared experts

    @property
    def frozen(self) -> tuple[str, ...]:
        return self.router, *self.gates


def routed_layers(model: nn.Module) -> tuple[RoutedLayer, ...]:
    """The layers whose experts can be computed here, in the model's order."""
    layers = []
    for name, module in model.named_modules():
        if not experts.is_experts(module):
            continue
        block = name.rpartition(".")[0]
        parts = dict(model.get_submodule(block).named_children())
        router = next((part for part in ROUTER_NAMES if part in parts), None)
        # One that is a linear layer alone leaves the choice to code around it.
        if router is not None and not isinstance(parts[router], nn.Linear):
            gates = tuple(f"{block}.{part}" for part, own in parts.items() if _is_gate(own))
            layers.append(RoutedLayer(name, f"{block}.{router}", gates))
    return tuple(layers)


def _is_gate(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.out_features == 1


class Routing:
    """The layers of one model that have experts, and what they choose in the pass at hand."""

    def __init__(self, model: nn.Module, layers: Sequence[RoutedLayer]) -> None:
        """Puts our function in the place of the experts' own."""
        self.layers = [Experts(model.get_submodule(layer.experts)) for layer in layers]
        self._told: Tensor | None = None
        self._chosen: list[Tensor | None] = [None] * len(layers)
        for number, (layer, own) in enumerate(zip(layers, self.layers, strict=True)):
            own.module.routed = partial(self._run, number)
            router: Any = model.get_submodule(layer.router)
            router.forward = partial(self._route, number, router.forward)
            for name in layer.gates:
                gate: Any = model.get_submodule(name)
                gate.forward = partial(_gate, gate)
        experts.register()
        model.set_experts_implementation(experts.REGISTERED_NAME)  # type: ignore[operator]
        self._routers = [model.get_submodule(layer.router) for layer in layers]
        names = [name for layer in layers for name in layer.gates]
        self._gates: list[Any] = [model.get_submodule(name) for name in names]

    @property
    def products(self) -> list[tuple[Product, LinearShape]]:
        """Of all matrices that are no nn.Linear and not packed, and of routers."""
        matrices = [p for r in self._routers for p in r.parameters() if p.dim() > 1]
        routers = [LinearShape(p.shape[1], p.shape[0]) for p in matrices if min(p.shape) > 1]
        gates = [LinearShape(gate.weight.shape[1], GATE_COLUMNS) for gate in self._gates]
        own = [(functional.linear, shape) for shape in (*routers, *gates)]
        return [*own, *(each for layer in self.layers for each in layer.products)]

    @property
    def experts(self) -> int:
        """Of a layer; what differs from layer to layer is not served."""
        return self.layers[0].count

    @property
    def experts_per_token(self) -> int:
        return self.chosen[0].shape[1]

    @property
    def chosen(self) -> list[Tensor]:
        """Of each layer the experts [T, k] of the last pass, which the next one replaces."""
        return [index for index in self._chosen if index is not None]

    def begin(self, told: Tensor | None) -> None:
        """Before a pass. `told`: [T, L, k] where its tokens go, ROUTERS_CHOICE where the routers
        choose; it stays until the next pass, for what is recomputed in backward.
        """
        self._told = told
        self._chosen = [None] * len(self.layers)

    def choose_library(self) -> None:
        """Takes the one that is faster with many rows."""
        for layer in self.layers:
            layer.choose_library()

    def pack(self, packing: Packing) -> None:
        """Packs the weights of the experts, for passes without backward."""
        for layer in self.layers:
            layer.pack(packing)

    def _run(self, number: int, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self._chosen[number] = index
        return self.layers[number](x, index, weights)

    def _route(
        self, number: int, own: Callable[..., Any], x: Tensor, *others: Any
    ) -> tuple[Tensor, ...]:
        """`others`: what a router takes beside the rows, such as a bias of each expert."""
        rows, count = _filled_up(x)
        more = len(rows) - count
        if x.dim() > 2:  # some take no rows without a batch around them
            rows = rows[None]
        if self._told is None:
            outputs = own(rows, *others)
        else:
            told = functional.pad(self._told[:, number], (0, 0, 0, more), value=ROUTERS_CHOICE)
            with _Told(told, self.layers[number].count):
                outputs = own(rows, *others)
        return tuple(part.flatten(0, -2)[:count] for part in outputs)


def _filled_up(x: Tensor) -> tuple[Tensor, int]:  # [..., d] -> [P, d], and how many are not to fill
    rows = x.reshape(-1, x.shape[-1])
    more = -len(rows) % ROUTED_ROWS if rows.is_cpu else 0
    return (functional.pad(rows, (0, 0, 0, more)) if more else rows), len(rows)


def _gate(gate: Any, x: Tensor) -> Tensor:  # [..., d] -> [..., 1]
    """On a CPU one column of several: torch computes functions of what does not lie side by side
    number by number.
    """
    if not x.is_cpu:
        return functional.linear(x, gate.weight, gate.bias)
    rows, count = _filled_up(x)
    bias = None if gate.bias is None else gate.bias.expand(GATE_COLUMNS)
    wide = functional.linear(rows, gate.weight.expand(GATE_COLUMNS, -1), bias)
    return wide[:count, :1].view(*x.shape[:-1], 1)


class _Told(TorchFunctionMode):
    """A router's choice of its best experts gives those that were told, in which scores ever it
    chooses: their weights are then computed by its own code.
    """

    def __init__(self, told: Tensor, experts: int) -> None:  # [T, k]
        super().__init__()
        self._told = told
        self._experts = experts

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return result
        scores, indices = args[0], result.indices
        # Routers that choose groups first choose among other things than all experts.
        if scores.dim() != 2 or scores.shape[1] != self._experts or not _alike(indices, self._told):
            return result
        chosen = torch.where(self._told == ROUTERS_CHOICE, indices, self._told.long())
        return torch.return_types.topk((scores.gather(1, chosen), chosen))


def _alike(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape
