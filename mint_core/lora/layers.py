"""Linear layers that apply many adapters at once: each to its own rows of a packed stream. Layers
of one group are computed when the first of them is called.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mint_core.lora import kernels
from mint_core.lora.algorithms import Adapted, Gradients
from mint_core.lora.columns import ActiveColumns
from mint_core.lora.float8 import side_by_side
from mint_core.lora.groups import ModuleGroup
from mint_core.lora.lanes import Lanes, RowProducts
from mint_core.lora.products import onednn
from mint_core.lora.products.packed import PackedLinear
from mint_core.lora.segment_tables import Tables
from mint_core.lora.segments import MIN_ROWS as MIN_ROWS
from mint_core.lora.segments import VECTOR_BYTES, rows_apart
from mint_core.lora.segments import Segment as Segment


class LoraContext:
    """What the layers of one model apply in the pass at hand. One object, shared by all of them."""

    def __init__(self) -> None:
        self._segments: tuple[Segment, ...] = ()
        self._adapted: dict[tuple[Segment, ...], Adapted] = {}
        self._recorded: Tables | None = None  # what a recorded pass knows of the segments
        self.columns: ActiveColumns | None = None  # applied in the place of segments
        # Of the group computed last, from one tensor: outputs that its other layers have not asked
        # for yet, by place in the group.
        self.waiting: tuple[LinearGroup, Tensor, dict[int, Tensor]] | None = None
        self.lanes: Lanes | None = None  # without, no segment may be rowwise
        self.products: list[RowProducts] = []  # of segments that are
        # Whether kernels compute what a row gets of frozen weights from that row alone.
        self.row_wise = False

    @contextmanager
    def applying(
        self, segments: tuple[Segment, ...], recorded: Tables | None = None
    ) -> Iterator[None]:
        """Around a pass over a stream of these segments. They stay until the next one's, or until
        they are forgotten: what is recomputed in backward applies them again.
        """
        self._recorded = recorded
        self._segments = tuple(s for s in segments if not s.rowwise)
        self._adapted.clear()
        self.products = self.lanes.of(segments) if self.lanes else []
        assert self.lanes or len(self._segments) == len(segments), "rowwise: weights not packed"
        try:
            yield
        finally:
            self.waiting = None  # a pass that was cut short may have left some

    def forget(self) -> None:
        """Lets go of the segments: memory of rows that leave is free at once."""
        self._segments = ()
        self._adapted.clear()

    @contextmanager
    def side_by_side(self, columns: ActiveColumns | None) -> Iterator[None]:
        """Around a pass without segments, whose rows are in any order: what these columns hold is
        applied, or the base model alone.
        """
        self.columns = columns
        try:
            yield
        finally:
            self.columns = None

    def adapted(self, group: ModuleGroup, like: Tensor) -> Adapted | None:
        """The segments that adapt a group; None if none does."""
        # A recorded pass launches the same for every group: what does not train it is zero in it.
        every = self._recorded is not None and kernels.run_on(like.device)
        segments = tuple(
            s for s in self._segments if s.row is not None and (every or s.row.trains(group))
        )
        if not segments:
            return None
        if segments not in self._adapted:
            recorded = self._recorded if every else None
            self._adapted[segments] = Adapted(segments, like.device, like.dtype, recorded)
        return self._adapted[segments]


class Cut:
    """The layers of a group in neighbourhoods, whose outputs are one tensor each."""

    def __init__(self, linears: "LinearGroup", counts: Sequence[int]) -> None:
        sizes = iter(linears.group.out_features)
        self._layers = [tuple(itertools.islice(sizes, count)) for count in counts]
        self._widths = [sum(part) for part in self._layers]
        self._each = all(len(part) == 1 for part in self._layers)
        vector = VECTOR_BYTES // linears.weight.element_size()
        self.odd = any(width % vector for width in self._widths)
        # Rows side by side would not all begin where a CPU reads whole vectors, which MKL minds.
        self._crooked = bool(sum(self._widths) % 8)
        # Of each neighbourhood, [width, in]; none once they are packed.
        self.weights: Sequence[Tensor] = linears.weight.split_with_sizes(self._widths)
        self.biases: Sequence[Tensor | None] = (
            [None] * len(self._widths)
            if linears.bias is None
            else linears.bias.split_with_sizes(self._widths)
        )

    def parts(self, wide: Tensor) -> tuple[Tensor, ...]:
        """[T, width of the group] -> of each neighbourhood, [T, width]."""
        if self._crooked or (self.odd and len(self._widths) == 1):
            wide = rows_apart(wide)
        return (wide,) if len(self._widths) == 1 else wide.split_with_sizes(self._widths, 1)

    def layers(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Cuts the parts, each [T, width], into those of each layer."""
        if self._each:
            return parts
        cut = [
            part.split_with_sizes(sizes, 1) if len(sizes) > 1 else (part,)
            for part, sizes in zip(parts, self._layers, strict=True)
        ]
        return [layer for layers in cut for layer in layers]


class LinearGroup:
    """Frozen nn.Linears of one input, their weights side by side, plus, for each segment of the
    stream, its adapter's B A of each.
    """

    def __init__(
        self, group: ModuleGroup, linears: Sequence[nn.Linear], context: LoraContext
    ) -> None:
        self.group = group
        self.float8 = side_by_side(linears)  # None: the weight is of the type of x
        # [W, in]
        self.weight = (
            self.float8.numbers
            if self.float8 is not None
            else _side_by_side([linear.weight for linear in linears])
        )
        biases = [linear.bias for linear in linears]
        self.bias = None if biases[0] is None else _side_by_side(biases)  # [W]
        self._cuts: dict[tuple[int, ...], Cut] = {}
        self.each = self.cut([1] * len(linears))
        self._packed: PackedLinear | None = None
        self.product: onednn.Product = functional.linear  # with weights as they lie
        self.layers: list[MultiLoraLinear] = []
        self._context = context
        # Weights are frozen and gradients of adapters go straight to their rows: this tells
        # autograd where there is something to train, so that it goes back no further than that.
        self._trained = torch.zeros((), device=self.weight.device, requires_grad=True)

    def cut(self, counts: Sequence[int]) -> Cut:
        """For outputs of so many layers together each."""
        return self._cuts.setdefault(tuple(counts), Cut(self, counts))

    def output(self, member: int, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        """One layer's; the others' wait for their call with the same tensor."""
        if len(self.group.modules) == 1:
            (output,) = self.outputs(x)
        else:
            group, input, waiting = self._context.waiting or (None, None, {})
            if group is not self or input is not x or member not in waiting:
                waiting = dict(enumerate(self.outputs(x)))
            output = waiting.pop(member)
            # None at the end, so that nothing holds the pass when it is over.
            self._context.waiting = (self, x, waiting) if waiting else None
        return output.view(*x.shape[:-1], output.shape[-1])

    def outputs(self, x: Tensor, cut: Cut | None = None) -> Sequence[Tensor]:
        """[..., in] -> of each layer, [T, out]; or of several side by side, as the cut has it."""
        cut = cut or self.each
        flat = x.reshape(-1, self.group.in_features)
        if self._context.columns is not None:
            y = self._wide(flat)
            self._context.columns.add(flat, y, self.group)
            return cut.parts(y)
        adapted = self._context.adapted(self.group, flat)
        if not torch.is_grad_enabled():
            outputs = self.base(flat, cut)
            if adapted is not None or self._context.products:
                layers = cut.layers(outputs)
                if adapted is not None:
                    adapted.algorithm.forward(flat, layers, adapted, self.group)
                for product in self._context.products:
                    product.add(flat, layers, self.group)
            return outputs
        trained = self._trained if adapted and adapted.accumulates else None
        results: tuple[Tensor, ...] = LoraLinearFunction.apply(  # type: ignore[no-untyped-call]
            flat, self, adapted, cut, trained
        )
        return results

    def base(self, x: Tensor, cut: Cut) -> tuple[Tensor, ...]:
        """[T, in] -> of each part of the cut, [T, width], without adapters."""
        if self._packed is None and self.float8 is None and not kernels.run_on(x.device):
            # Calls are cheap, and what follows reads dense outputs faster.
            products = zip(cut.weights, cut.biases, strict=True)
            outputs = tuple(self.product(x, weight, bias) for weight, bias in products)
            return tuple(map(rows_apart, outputs)) if cut.odd else outputs
        return cut.parts(self._wide(x))

    def _wide(self, x: Tensor) -> Tensor:  # [T, in] -> [T, W]
        if self._packed is not None:
            return self._packed(x)
        if self.float8 is not None:
            return self.float8.product(x, self.bias)
        if self._context.row_wise:
            from mint_core.lora.weight_kernels import multiply_plain  # Triton is not everywhere

            return multiply_plain(x, self.weight, self.bias)
        return functional.linear(x, self.weight, self.bias)

    def back(self, dys: Sequence[Tensor], cut: Cut) -> Tensor:
        """Of each part of the cut, [T, width] -> [T, in], without adapters."""
        if self.float8 is not None:
            return self.float8.back(dys)
        if self.product is onednn.product:
            dx = onednn.product(dys[0], cut.weights[0].t())
            for dy, weight in zip(dys[1:], cut.weights[1:], strict=True):
                dx.add_(onednn.product(dy, weight.t()))
            return dx
        dx = dys[0] @ cut.weights[0]
        for dy, weight in zip(dys[1:], cut.weights[1:], strict=True):
            dx.addmm_(dy, weight)
        return dx

    def choose_library(self) -> None:
        """Takes the one that is faster with many rows."""
        if self.float8 is None:
            self.product = onednn.faster(self.weight)

    def rows_computed(self, rows: int) -> int:
        """How many rows a product of so many has."""
        return onednn.rows_computed(rows) if self.product is onednn.product else rows

    def pack(self, packed: PackedLinear) -> None:
        """From now on computes with packed weights alone, for passes without backward."""
        self._packed = packed
        self.weight = self.weight.new_empty(0)
        for cut in self._cuts.values():
            cut.weights = cut.biases = ()
        for layer in self.layers:
            layer.weight = nn.Parameter(self.weight, requires_grad=False)


class MultiLoraLinear(nn.Module):
    """A layer of a group."""

    def __init__(self, name: str, group: LinearGroup, member: int) -> None:
        super().__init__()
        self.name = name
        # A view of the group's.
        self.weight = nn.Parameter(group.each.weights[member], requires_grad=False)
        bias = group.each.biases[member]
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.in_features = group.group.in_features
        self.out_features = group.group.out_features[member]
        self.together = group
        self._member = member
        group.layers.append(self)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return self.together.output(self._member, x)


class LoraLinearFunction(torch.autograd.Function):
    """y = x W^T + b of each layer of a group, and each segment's adapters on top.

    Backward adds dA and dB straight to the rows' gradients, segment after segment: the sum of one
    adapter does not depend on its neighbours.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        linears: LinearGroup,
        adapted: Adapted | None,
        cut: Cut,
        trained: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs = linears.base(x, cut)
        if adapted is not None:
            saved = adapted.algorithm.forward(x, cut.layers(outputs), adapted, linears.group)
            ctx.save_for_backward(x, *saved)
        ctx.linears, ctx.adapted, ctx.cut = linears, adapted, cut
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        linears: LinearGroup = ctx.linears
        adapted: Adapted | None = ctx.adapted
        dys = [gradient.contiguous() for gradient in gradients]
        if ctx.cut.odd:
            dys = [rows_apart(dy) for dy in dys]
        dx = linears.back(dys, ctx.cut) if ctx.needs_input_grad[0] else None
        if adapted is not None:
            x, *saved = ctx.saved_tensors
            tensors = Gradients(x, ctx.cut.layers(dys), dx)
            adapted.algorithm.backward(tensors, saved, adapted, linears.group)
        return dx, None, None, None, None


def install(
    model: nn.Module, context: LoraContext, groups: Sequence[ModuleGroup]
) -> list[LinearGroup]:
    """Puts a MultiLoraLinear in the place of every nn.Linear. The groups hold them all."""
    installed = []
    for group in groups:
        layers = [model.get_submodule(name) for name in group.modules]
        linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        together = LinearGroup(group, linears, context)
        installed.append(together)
        for member, name in enumerate(group.modules):
            parent_name, _, child = name.rpartition(".")
            layer = MultiLoraLinear(name, together, member)
            setattr(model.get_submodule(parent_name), child, layer)
    return installed


def _side_by_side(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0].detach() if len(matrices) == 1 else torch.cat([m.detach() for m in matrices])
