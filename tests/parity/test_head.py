"""The chunked head against full logits."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mint_core.lora.bank import AdapterRow, Part
from mint_core.lora.layers import Segment
from mint_core.lora.spec import AdapterSpec
from mint_core.model.head import Piece
from mint_core.model.loading import LoadedBase
from mint_core.model.softmax import PlainSoftmax
from tests.models import load_base

ROWS = (1, 5, 37, 2)  # scored of each segment


@pytest.fixture(scope="module")
def base(llama_folder: Path) -> LoadedBase:
    return load_base(str(llama_folder))


def matrices(base: LoadedBase, row: AdapterRow, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's A and B: the same tensors each time."""
    (group,) = [group for group in base.groups if group.modules == ("lm_head",)]
    own = row.group(part, group)
    return own.a, own.b[0]


@pytest.fixture(scope="module")
def segments(base: LoadedBase) -> list[Segment]:
    bank = base.new_bank()
    torch.manual_seed(0)
    made = []
    for i, rank in enumerate((8, 3, 16)):
        spec = AdapterSpec(rank=rank, alpha=9.0, use_rslora=False, seed=i, modules=("lm_head",))
        row = bank.add(spec)
        a, b = matrices(base, row, Part.WEIGHTS)
        a[:rank].normal_(0, 0.3)
        b[:, :rank].normal_(0, 0.3)
        made.append(Segment(50 * i, 50 * (i + 1), row, accumulate=True))
    return [*made, Segment(150, 200)]


def pieces_and_targets(segments: list[Segment]) -> tuple[list[Piece], list[torch.Tensor]]:
    rng = np.random.default_rng(1)
    pieces, targets = [], []
    for segment, count in zip(segments, ROWS, strict=True):
        rows = segment.start + np.sort(rng.permutation(50)[:count])
        pieces.append(Piece(segment, torch.from_numpy(rows)))
        targets.append(torch.from_numpy(rng.integers(0, 512, count)))
    return pieces, targets


def wide_targets(targets: list[torch.Tensor], widths: list[int]) -> list[torch.Tensor]:
    """The targets as k at each row, one of them twice; width 0: as they are."""
    wide = []
    for target, width in zip(targets, widths, strict=True):
        columns = torch.stack([(target + 31 * j) % 512 for j in range(width or 1)], 1)
        if width > 2:
            columns[:, 1] = columns[:, 0]
        wide.append(columns if width else target)
    return wide


def full_logprobs(
    base: LoadedBase, hidden: torch.Tensor, piece: Piece, targets: torch.Tensor
) -> torch.Tensor:  # as `targets`
    """By the book, in float64."""
    x = hidden[piece.rows].double()
    logits = x @ base.model.get_submodule("lm_head").weight.double().T  # type: ignore[union-attr,operator]
    if piece.segment.row is not None:
        a, b = (m.double() for m in matrices(base, piece.segment.row, Part.WEIGHTS))
        logits = logits + piece.segment.row.spec.scale * (x @ a.T) @ b.T
    return logits.log_softmax(-1).gather(1, targets.reshape(len(targets), -1)).view(targets.shape)


def head_gradient(
    base: LoadedBase, hidden: torch.Tensor, upstream: list[torch.Tensor]
) -> Callable[[list[Piece], list[torch.Tensor]], tuple[list[torch.Tensor], torch.Tensor | None]]:
    """Runs `Head.gradient` with slopes that are known beforehand; also what it showed them."""

    def run(
        pieces: list[Piece], targets: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        seen = [torch.full(target.shape, torch.nan) for target in targets]

        def slope(number: int, place: slice, logprobs: torch.Tensor) -> torch.Tensor:
            seen[number][place] = logprobs
            return upstream[number][place]

        return seen, base.head.gradient(hidden, pieces, targets, slope)

    return run


@pytest.mark.parametrize(
    "widths", [[0, 0, 0, 0], [3, 3, 3, 3], [0, 3, 3, 1], [5, 0, 2, 0]], ids=str
)
@pytest.mark.parametrize("weighted", ["all", "some"])
@pytest.mark.parametrize("chunk_rows", [4, 7, 16, 1000])
def test_chunked_scores_and_gradients_equal_full_ones(
    base: LoadedBase,
    segments: list[Segment],
    chunk_rows: int,
    weighted: str,
    widths: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base.head, "chunk_rows", chunk_rows)
    hidden = torch.randn(200, 64, generator=torch.Generator().manual_seed(3))
    pieces, targets = pieces_and_targets(segments)
    targets = wide_targets(targets, widths)
    upstream = [torch.linspace(-1, 2, t.numel()).view(t.shape) for t in targets]
    if weighted == "some":
        for slopes in upstream:
            slopes[::3] = 0.0
    gradients = [matrices(base, s.row, Part.GRADIENT) for s in segments if s.row]
    for gradient in itertools.chain(*gradients):
        gradient.zero_()
    scores = base.head.logprobs(hidden, pieces, targets)
    seen, dx = head_gradient(base, hidden, upstream)(pieces, targets)
    assert dx is not None
    assert all(torch.equal(a, b) for a, b in zip(scores, seen, strict=True))
    leaf = hidden.clone().requires_grad_()
    total = torch.zeros(())
    weights = [matrices(base, s.row, Part.WEIGHTS) for s in segments if s.row]
    for matrix in itertools.chain(*weights):
        matrix.requires_grad_()
    try:
        for piece, target, score, slope in zip(pieces, targets, scores, upstream, strict=True):
            expected = full_logprobs(base, leaf, piece, target)
            assert torch.allclose(score.double(), expected.detach(), atol=2e-5)
            total = total + (expected * slope).sum()
        wanted = torch.autograd.grad(total, [leaf, *itertools.chain(*weights)])
    finally:
        for matrix in itertools.chain(*weights):
            matrix.requires_grad_(False)
    for ours, theirs in zip([dx, *itertools.chain(*gradients)], wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_where_no_loss_has_a_slope_there_is_no_gradient(
    base: LoadedBase, segments: list[Segment]
) -> None:
    hidden = torch.randn(200, 64, generator=torch.Generator().manual_seed(3))
    pieces, targets = pieces_and_targets(segments)
    flat = [torch.zeros(len(target)) for target in targets]
    seen, dx = head_gradient(base, hidden, flat)(pieces, targets)
    assert dx is None
    scores = base.head.logprobs(hidden, pieces, targets)
    assert all(torch.equal(a, b) for a, b in zip(scores, seen, strict=True))


def test_a_segments_scores_do_not_depend_on_its_neighbours(
    base: LoadedBase, segments: list[Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.head, "chunk_rows", 16)
    hidden = torch.randn(200, 64, generator=torch.Generator().manual_seed(3))
    pieces, targets = pieces_and_targets(segments)
    wide = wide_targets(targets, [0, 3, 0, 2])
    narrow, mixed = (base.head.logprobs(hidden, pieces, chosen) for chosen in (targets, wide))
    for i, score in enumerate(narrow):
        assert torch.equal(base.head.logprobs(hidden, [pieces[i]], [targets[i]])[0], score)
        assert torch.equal(base.head.logprobs(hidden, [pieces[i]], [wide[i]])[0], mixed[i])
        first = mixed[i] if mixed[i].dim() == 1 else mixed[i][:, 0]
        assert torch.equal(first, score)  # whatever else its row was asked for


@pytest.mark.parametrize("rows", [1, 4, 7, 64, 300])
@pytest.mark.parametrize("k", [1, 2, 9, 129, 5000])
def test_a_rows_targets_are_added_in_their_order(rows: int, k: int) -> None:
    """So a row has the same bits whatever rows are beside it, and however many targets there are a
    sum costs one call.
    """
    generator = torch.Generator().manual_seed(rows)
    upstream = torch.randn(rows, k, generator=generator)
    targets = torch.randint(0, 40, (rows, k), generator=generator)
    z = torch.randn(rows, 40, generator=generator)
    total = upstream[:, 0]
    for column in range(1, k):
        total = total + upstream[:, column]
    powers = (z - z.amax(1)[:, None]).exp()
    expected = powers * -(total / powers.sum(1))[:, None]

    gradient = PlainSoftmax(z.clone()).gradient(None, targets, upstream)

    assert torch.equal(gradient, expected.scatter_add_(1, targets, upstream))
