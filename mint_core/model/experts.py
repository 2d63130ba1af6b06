"""Frozen experts, of which each token goes through a few, as our own function in transformers'
registry of experts.

A token's output depends on that token alone. On a CPU, rows that share an expert are computed side
by side, filled up to as many as a product needs for bits of its own; activations go row by row,
since torch computes what is left of a vector otherwise; and what the experts make of a token is
added up in their order in `index`.

T: tokens. k: experts of each. E: experts. d: hidden size. i: inner size.
P: rows of all experts: T k, and those that fill up.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from mint_core.lora.groups import LinearShape
from mint_core.lora.products import onednn
from mint_core.lora.products.packed import PackedLinear, Packing
from mint_core.lora.segments import MIN_ROWS

REGISTERED_NAME = "mint_grouped"
# As transformers tells what runs through its registry.
_LAYOUT = {
    **{"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False},
    "_is_expert_parallel": False,
}
CHUNK_BYTES = 128 * 2**20  # of the inputs of all experts that are held at once, on a CPU


class Grouping:
    """Where the rows of each expert lie in one tensor, [P], expert after expert."""

    def __init__(self, index: Tensor, experts: int, min_rows: int) -> None:  # index: [T, k]
        chosen = index.reshape(-1).numpy().astype(np.uint16)  # whose stable sort is linear
        order = np.argsort(chosen, kind="stable")
        counts = np.bincount(chosen, minlength=experts)
        used = np.flatnonzero(counts)
        counts = counts[used]
        sizes = np.maximum(counts, min_rows)
        before = np.cumsum(sizes) - sizes - (np.cumsum(counts) - counts)  # that fill up
        at = np.arange(len(order)) + np.repeat(before, counts)
        rows = np.zeros(sizes.sum(), np.int64)  # what fills up is the first token, left out again
        rows[at] = order // index.shape[1]
        places = np.empty(len(order), np.int64)
        places[order] = at
        self.experts: list[int] = used.tolist()
        self.sizes: list[int] = sizes.tolist()
        self._rows = torch.from_numpy(rows)  # [P] of the tokens
        self._places = torch.from_numpy(places).view(index.shape)  # [T, k] of those rows

    def spread(self, x: Tensor) -> Tensor:  # [T, d] -> [P, d]
        return x.index_select(0, self._rows)

    def spread_weights(self, weights: Tensor) -> Tensor:  # [T, k] -> [P, 1]
        wide = weights.new_zeros(len(self._rows))
        return wide.index_copy_(0, self._places.flatten(), weights.flatten())[:, None]

    def collect_weights(self, rows: Tensor) -> Tensor:  # [P] -> [T, k]
        return rows.index_select(0, self._places.flatten()).view(self._places.shape)

    def add_up(self, rows: Tensor) -> Tensor:  # [P, d] -> [T, d]
        """The sum over the rows of each token. One after the other: torch's sums choose an order
        by their shape.
        """
        first, *others = self._places.unbind(1)
        total = rows.index_select(0, first)
        for places in others:
            total.add_(rows.index_select(0, places))
        return total


class _Matrices:
    """One matrix [out, in] of each expert."""

    def __init__(self, weights: Tensor) -> None:  # [E, out, in]
        self._each = weights.detach().unbind(0)
        self._turned = [weight.t() for weight in self._each]
        self.shape = LinearShape(weights.shape[2], weights.shape[1])
        self.product: onednn.Product = functional.linear  # with weights as they lie
        self._packed: list[PackedLinear] = []  # all, or none

    def apply(self, x: Tensor, grouping: Grouping) -> Tensor:  # [P, in] -> [P, out]
        parts = x.split(grouping.sizes)
        if self._packed:
            each = zip(grouping.experts, parts, strict=True)
            return torch.cat([self._packed[expert](part) for expert, part in each])
        return self._products(parts, [self._turned[expert] for expert in grouping.experts])

    def back(self, dy: Tensor, grouping: Grouping) -> Tensor:  # [P, out] -> [P, in]
        own = [self._each[expert] for expert in grouping.experts]
        return self._products(dy.split(grouping.sizes), own)

    def pack(self, packing: Packing) -> bool:
        """Computes with packed weights alone from now on, for passes without backward; False: they
        are not packed.
        """
        self._packed = packing.layers(self._each)
        if self._packed:
            self._each, self._turned = (), []
        return self.is_packed

    @property
    def is_packed(self) -> bool:
        return bool(self._packed)

    def choose_library(self) -> None:
        """Takes the one that is faster with many rows."""
        self.product = onednn.faster(self._each[0])

    def _products(self, parts: Sequence[Tensor], matrices: Sequence[Tensor]) -> Tensor:
        """Each [n, in] with its own [in, out], side by side: [P, out]."""
        if self.product is onednn.product:
            each = zip(parts, matrices, strict=True)
            return torch.cat([onednn.product(part, matrix.t()) for part, matrix in each])
        result = parts[0].new_empty(sum(map(len, parts)), matrices[0].shape[1])
        outputs = result.split([len(part) for part in parts])
        for part, matrix, output in zip(parts, matrices, outputs, strict=True):
            torch.mm(part, matrix, out=output)
        return result


class Experts:
    """The experts of one layer: down(act(gate x) * up x), times the token's weight for it."""

    def __init__(self, module: Any) -> None:
        self.module = module
        if not hasattr(module, "has_gate"):  # it does not ask the registry: Step 3.7
            for name, value in _LAYOUT.items():
                setattr(module, name, value)
            module.forward = partial(_run, module)
        self.count: int = module.gate_up_proj.shape[0]
        self._gate_up = _Matrices(module.gate_up_proj)
        self._down = _Matrices(module.down_proj)
        self._min_rows = MIN_ROWS
        self._chunk_tokens_of_one = max(1, CHUNK_BYTES // (4 * self._down.shape.out_features))

    def __call__(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """x [T, d], index and weights [T, k] -> [T, d]."""
        if not x.is_cpu:
            y: Tensor = grouped_mm_experts_forward(self.module, x, index, weights)
            return y
        most = max(MIN_ROWS, self._chunk_tokens_of_one // index.shape[1])
        parts = zip(x.split(most), index.split(most), weights.split(most), strict=True)
        outputs = [self._chunk(*part) for part in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _chunk(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        grouping = Grouping(index, self.count, self._min_rows)
        if torch.is_grad_enabled():
            y: Tensor = _ExpertsFunction.apply(x, weights, self, grouping)  # type: ignore[no-untyped-call]
            return y
        return self.forward(x, weights, grouping)[0]

    def forward(
        self, x: Tensor, weights: Tensor, grouping: Grouping
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output [T, d]; and for backward [P, 2i] before the activation, and weights [P, 1]."""
        gate_up = self._gate_up.apply(grouping.spread(x), grouping)
        wide = grouping.spread_weights(weights)
        inner = self.gated(gate_up).mul_(wide)
        return grouping.add_up(self._down.apply(inner, grouping)), gate_up, wide

    def backward(
        self, dy: Tensor, gate_up: Tensor, wide: Tensor, grouping: Grouping
    ) -> tuple[Tensor, Tensor]:
        """The gradients of x [T, d] and of weights [T, k]."""
        d_inner = self._down.back(grouping.spread(dy), grouping)  # [P, i], but for the weight
        with torch.enable_grad():
            leaf = gate_up.detach().requires_grad_()
            inner = self.gated(leaf)
        d_weights = grouping.collect_weights((inner.detach() * d_inner).sum(1))
        (d_gate_up,) = torch.autograd.grad(inner, leaf, d_inner.mul_(wide))
        return grouping.add_up(self._gate_up.back(d_gate_up, grouping)), d_weights

    def gated(self, gate_up: Tensor) -> Tensor:  # [P, 2i] -> [P, i]
        """Row by row, since the halves of a row do not lie side by side with those of the next."""
        inner: Tensor = self.module._apply_gate(gate_up)
        return inner

    def choose_library(self) -> None:
        """Takes the one that is faster with many rows."""
        self._gate_up.choose_library()
        self._down.choose_library()

    def pack(self, packing: Packing) -> None:
        """Packs the weights if rows are computed alike then. For passes without backward."""
        for name, own in {"gate_up_proj": self._gate_up, "down_proj": self._down}.items():
            if own.pack(packing):
                empty = getattr(self.module, name).new_empty(0)
                setattr(self.module, name, nn.Parameter(empty, requires_grad=False))
        self._min_rows = MIN_ROWS if self.products else 1

    @property
    def products(self) -> list[tuple[onednn.Product, LinearShape]]:
        """Of what is not packed."""
        matrices = self._gate_up, self._down
        return [(own.product, own.shape) for own in matrices if not own.is_packed]


class _ExpertsFunction(torch.autograd.Function):
    """Backward goes through inputs and weights alone: experts are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, experts: Experts, grouping: Grouping
    ) -> Tensor:
        y, gate_up, wide = experts.forward(x, weights, grouping)
        ctx.save_for_backward(gate_up, wide)
        ctx.experts, ctx.grouping = experts, grouping
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, d_weights = ctx.experts.backward(gradients[0], *ctx.saved_tensors, ctx.grouping)
        return dx, d_weights, None, None


def is_experts(module: Any) -> bool:
    """Whether a module has the one layout that is computed here: gate and up of an expert are one
    matrix [2i, d], without biases.
    """
    if not hasattr(module, "_apply_gate"):
        return False
    if any(getattr(module, name, value) != value for name, value in _LAYOUT.items()):
        return False
    gate_up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if gate_up is None or down is None or down.dim() != 3:
        return False
    experts, hidden, inner = down.shape
    return bool(gate_up.shape == (experts, 2 * inner, hidden))


def register() -> None:
    """Makes `experts_implementation=REGISTERED_NAME` known to transformers."""
    ExpertsInterface.register(REGISTERED_NAME, _run)


def _run(module: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    y: Tensor = module.routed(hidden_states, index, weights)
    return y
