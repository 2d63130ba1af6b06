"""Every way to apply adapters against the loop, and the loop against each segment alone."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mint_core.lora.algorithms import (
    GROUPED,
    KERNELS,
    LOOP,
    MOST_KERNEL_ROWS,
    Adapted,
    Algorithm,
    Gradients,
    choose,
)
from mint_core.lora.bank import AdapterBank, AdapterRow, Part
from mint_core.lora.groups import LinearShape, complete
from mint_core.lora.segments import Segment
from mint_core.lora.spec import AdapterSpec

SHAPES = {"q": LinearShape(48, 32), "k": LinearShape(48, 16), "v": LinearShape(48, 16)}
(GROUP,) = complete(SHAPES, [("q", "k", "v")])
RANKS = (8, 3, 32, 8, 16)
ALIKE = (8, 3, 8, 7, 8)  # all stored with rank 8
TRAINED = (("q", "k", "v"), ("q", "v"), ("k",), ("k", "v"), ("q", "k", "v"))
# Between the third and the fourth lie rows of the base model alone.
PLACES = [(0, 9), (9, 14), (14, 60), (70, 74), (74, 90)]
ROWS = 96


class Case:
    """Adapters of several ranks with their segments and data, the same for a seed."""

    def __init__(
        self,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        ranks: Sequence[int] = RANKS,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.bank = AdapterBank((GROUP,), torch.device(device))
        self.rows = [self._row(*kind, generator) for kind in zip(ranks, TRAINED, strict=True)]
        self.segments = tuple(
            Segment(start, stop, row, accumulate=i != 1)
            for i, ((start, stop), row) in enumerate(zip(PLACES, self.rows, strict=True))
        )
        sizes = (48, GROUP.width, GROUP.width, 48)
        self.x, self.y, self.dy, self.dx = (
            torch.randn(ROWS, size, generator=generator).to(device, dtype) for size in sizes
        )

    def _row(self, rank: int, modules: tuple[str, ...], generator: torch.Generator) -> AdapterRow:
        spec = AdapterSpec(rank=rank, alpha=32.0, use_rslora=False, seed=0, modules=modules)
        row = self.bank.add(spec)
        for module in modules:
            a, b = row.bank.matrices(row.part(Part.WEIGHTS), module)
            for matrix in (a[: row.spec.rank], b[:, : row.spec.rank]):
                matrix.copy_(torch.randn(matrix.shape, generator=generator))
        return row

    def adapted(self, segments: tuple[Segment, ...] = ()) -> Adapted:
        return Adapted(segments or self.segments, self.x.device, self.x.dtype)

    def run(self, algorithm: Algorithm) -> list[Tensor]:
        """y, dx and the rows' gradients."""
        self.forward(algorithm, backward=True)
        gradients = [row.part(Part.GRADIENT) for row in self.rows]
        return [part.float().cpu() for part in (self.y, self.dx, *gradients)]

    def forward(self, algorithm: Algorithm, *, backward: bool = False) -> Tensor:
        adapted = self.adapted()
        saved = algorithm.forward(self.x, self.y.split(GROUP.out_features, 1), adapted, GROUP)
        if backward:
            algorithm.backward(self.gradients(), saved, adapted, GROUP)
        return self.y

    def gradients(self) -> Gradients:
        return Gradients(self.x, self.dy.split(GROUP.out_features, dim=1), self.dx)


@pytest.mark.parametrize("ranks", [RANKS, ALIKE], ids=["ranks", "one rank class"])
def test_grouped_products_equal_the_loop(ranks: Sequence[int]) -> None:
    grouped, loop = Case(ranks=ranks).run(GROUPED), Case(ranks=ranks).run(LOOP)
    for ours, expected in zip(grouped, loop, strict=True):
        assert (ours - expected).norm() <= 1e-6 * expected.norm()


def test_the_loop_is_each_segment_alone_bitwise() -> None:
    together = Case().run(LOOP)
    alone = Case()
    for segment in alone.segments:
        adapted = alone.adapted((segment,))
        saved = LOOP.forward(alone.x, alone.y.split(GROUP.out_features, 1), adapted, GROUP)
        LOOP.backward(alone.gradients(), saved, adapted, GROUP)
    gradients = [row.part(Part.GRADIENT) for row in alone.rows]
    for ours, expected in zip(together, (alone.y, alone.dx, *gradients), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("ranks", [RANKS, ALIKE], ids=["ranks", "one rank class"])
def test_a_segment_that_does_not_accumulate_leaves_its_gradient(ranks: Sequence[int]) -> None:
    for algorithm in (LOOP, GROUPED):
        gradients = Case(ranks=ranks).run(algorithm)[2:]
        assert [bool(gradient.any()) for gradient in gradients] == [i != 1 for i in range(5)]


@pytest.mark.parametrize(
    ("algorithm", "ranks"),
    [(LOOP, RANKS), (GROUPED, RANKS), (GROUPED, ALIKE)],
    ids=["loop", "grouped", "grouped, one rank class"],
)
def test_a_neighbours_nan_stays_with_it(algorithm: Algorithm, ranks: Sequence[int]) -> None:
    case, clean = Case(ranks=ranks), Case(ranks=ranks)
    case.x[9:14] = torch.nan
    case.rows[1].part(Part.WEIGHTS).fill_(torch.nan)
    for i, (ours, expected) in enumerate(
        zip(case.run(algorithm), clean.run(algorithm), strict=True)
    ):
        if i < 2:
            ours[9:14] = expected[9:14] = 0.0
        assert i == 3 or torch.equal(ours, expected)


def test_a_cpu_takes_the_loop_whatever_is_beside_a_run() -> None:
    case = Case()
    for segments in (case.segments, case.segments[:1]):
        assert choose(case.adapted(segments)) is LOOP


def test_an_accelerator_takes_kernels_for_few_rows_and_products_for_many() -> None:
    case = Case()
    cuda = torch.device("cuda")
    for segments in (case.segments, case.segments[:1]):
        assert choose(Adapted(segments, cuda, torch.bfloat16)) is KERNELS
    last = case.segments[-1]
    many = (*case.segments[:-1], replace(last, stop=last.start + MOST_KERNEL_ROWS))
    assert choose(Adapted(many, cuda, torch.bfloat16)) is GROUPED
    assert choose(Adapted(many[-1:], cuda, torch.bfloat16)) is KERNELS
    assert choose(Adapted(many, cuda, torch.float32)) is LOOP


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_an_accelerators_products_are_near_the_loop_on_the_cpu() -> None:
    for ranks in (ALIKE, RANKS):
        expected = Case(ranks=ranks).run(LOOP)
        grouped = Case("cuda", torch.bfloat16, ranks).run(GROUPED)
        for ours, reference in zip(grouped, expected, strict=True):
            assert (ours - reference).norm() <= 2e-2 * reference.norm()
