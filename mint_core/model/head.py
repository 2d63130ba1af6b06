"""The output head: logprobs of chosen tokens, and their gradient, without a [tokens, vocabulary]
tensor.

Rows are scored in chunks, and each chunk's gradient is reduced before the next chunk is scored: the
logits are computed once. A row's numbers do not depend on the rows beside it: an adapter's rows are
cut by themselves alone, and every matmul has at least MIN_ROWS rows, or is of packed weights.

n: rows of a piece. r: stored rank. V: vocabulary size. d: hidden size. A row may be scored for k
targets at once: the logits are those of the row, whatever k is, and so is its softmax.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mint_core.lora.algorithms import KERNELS, Adapted
from mint_core.lora.layers import MultiLoraLinear
from mint_core.lora.segments import MIN_ROWS, Segment, adapter_backward, adapter_forward
from mint_core.model.softmax import KernelSoftmax, PlainSoftmax, Softmax, ranked_exactly

# Of float32 logits. A CPU's matrix products are at full speed from some 100 rows, and glibc keeps
# freed blocks of up to 32 MiB for the next chunk, where a larger one is paged in afresh.
CHUNK_BYTES_CPU = 32 * 1024**2
CHUNK_BYTES = 256 * 1024**2

# d loss / d logprob of the rows of piece `number` at `place`, from their logprobs; both are of the
# shape of the targets, [n] or [n, k].
Slope = Callable[[int, slice, Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows of one segment that are scored together."""

    segment: Segment
    rows: Tensor  # [n] positions in the stream


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """A part of a piece, in a chunk."""

    number: int  # of the piece
    place: slice  # in the piece
    segment: Segment
    # [n, at least MIN_ROWS unless rowwise] positions in the stream, the first repeated to fill up
    rows: Tensor
    part: slice  # of the chunk

    @property
    def count(self) -> int:
        """Rows that are scored, those that fill up left out."""
        return int(self.place.stop - self.place.start)


@dataclass(frozen=True, slots=True, eq=False)
class _Scored:
    """A chunk's numbers, on which its gradient stands."""

    x: Tensor  # [rows, d]
    shrunk: list[Tensor | None]  # per cut, x A^T [n, r]
    softmax: Softmax
    targets: Tensor  # [rows] or [rows, k]
    logprobs: Tensor  # as `targets`
    bend: Tensor | None  # [rows, V], derivative of the soft cap


class Head:
    """Scores rows of the last hidden state."""

    def __init__(self, linear: MultiLoraLinear, softcap: float | None = None) -> None:
        self._linear = linear
        self._group = linear.together.group
        self.softcap = softcap  # c: logits become c tanh(logit / c); None: they stay
        self._kernels = linear.weight.device.type == "cuda" and softcap is None
        self._softmax = KernelSoftmax if self._kernels else PlainSoftmax
        chunk_bytes = CHUNK_BYTES_CPU if linear.weight.device.type == "cpu" else CHUNK_BYTES
        self.chunk_rows = max(MIN_ROWS, min(2048, chunk_bytes // (4 * linear.out_features)))
        self._row_wise = False

    def make_row_wise(self) -> None:
        """From now on a row gets what follows from it alone, by kernels, without backward."""
        self._row_wise = True
        self._softmax = KernelSoftmax

    def rows_computed(self, rows: int) -> int:
        """How many rows a product with the head has, for so many that are scored."""
        return self._linear.together.rows_computed(rows)

    def logits(self, hidden: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """Logits of the pieces' rows, piece after piece, [rows, V] float32. For few rows: it does
        hold them all.
        """
        chunk: list[_Cut] = []
        for number, piece in enumerate(pieces):
            _append(chunk, number, piece, slice(0, len(piece.rows)))
        z, _ = self._expand(hidden[torch.cat([cut.rows for cut in chunk])], chunk)
        z = self._capped(z)
        if all(len(cut.rows) == cut.count for cut in chunk):
            return z
        return torch.cat([z[cut.part][: cut.count] for cut in chunk])

    def all_logits(self, hidden: Tensor) -> Tensor:  # [rows, d] -> [rows, V] float32
        """Logits of every row, with what the layers' context applies. For few rows, as `logits`."""
        return self._capped(self._linear(hidden))

    def target_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:  # [T, d], [T] -> [T]
        """Logprobs of every row's target, float32, with what the layers' context applies. Under
        autograd: goes back through all rows. For few rows, as `logits`.
        """
        (z,) = self._linear.together.outputs(hidden)
        z = z if self._kernels else self._capped(z)
        logprobs: Tensor = _TargetLogprobs.apply(z, targets[:, None], self._softmax)  # type: ignore[no-untyped-call]
        return logprobs

    @torch.no_grad()
    def likeliest(self, hidden: Tensor, piece: Piece, k: int) -> tuple[Tensor, Tensor]:
        """Ids and logprobs of the k likeliest tokens of each row, [n, k], bit for bit as `logprobs`
        scores them. For few rows, as `logits`.
        """
        z = self.logits(hidden, [piece])
        values, ids = ranked_exactly(z, k) if self._row_wise else z.topk(k, dim=1)
        return ids, self._softmax(z).logprobs(values)

    @torch.no_grad()
    def logprobs(
        self,
        hidden: Tensor,  # [tokens, d]
        pieces: Sequence[Piece],
        targets: Sequence[Tensor],  # per piece, [n] or [n, k]
    ) -> list[Tensor]:  # per piece, as its targets, float32
        """Natural logarithm of the probability of each row's target, or of each of its k."""
        results = [torch.empty(target.shape, device=hidden.device) for target in targets]
        for chunk in self._chunks(pieces, targets):
            scored = self._score(hidden, chunk, targets)
            for cut in chunk:
                results[cut.number][cut.place] = scored.logprobs[cut.part][: cut.count]
        return results

    @torch.no_grad()
    def gradient(
        self,
        hidden: Tensor,  # [tokens, d]
        pieces: Sequence[Piece],
        targets: Sequence[Tensor],  # per piece, [n] or [n, k]
        slope: Slope,
    ) -> Tensor | None:  # [tokens, d]
        """d loss / d hidden, or None where no loss has a slope; adds the gradients of the head's
        adapters.

        `slope` sees each piece's rows once and in order. Where it says 0, a row costs no more than
        its logprob.
        """
        gradient = None
        for chunk in self._chunks(pieces, targets):
            scored = self._score(hidden, chunk, targets)
            slopes = [
                slope(cut.number, cut.place, scored.logprobs[cut.part][: cut.count])
                for cut in chunk
            ]
            steep = None if _all_steep(slopes, chunk) else [_steep_places(s) for s in slopes]
            if steep is None or any(len(places) for places, _ in steep):
                gradient = torch.zeros_like(hidden) if gradient is None else gradient
                every = [(None, slope) for slope in slopes]
                self._reduce(scored, chunk, steep or every, gradient)
        return gradient

    def _score(self, hidden: Tensor, chunk: Sequence[_Cut], targets: Sequence[Tensor]) -> _Scored:
        rows = torch.cat([cut.rows for cut in chunk])
        x = hidden[_filled(rows, self.rows_computed(len(rows)))]
        z, shrunk = self._expand(x, chunk)
        z = z if self._kernels else self._capped(z)
        own = [_filled(targets[cut.number][cut.place], len(cut.rows)) for cut in chunk]
        wanted = _filled(torch.cat(own), len(x))
        bend = None if self.softcap is None else 1 - (z / self.softcap).square()
        at_target = z.gather(1, _wide(wanted))
        softmax = self._softmax(z)
        logprobs = softmax.logprobs(at_target).view(wanted.shape)
        return _Scored(x, shrunk, softmax, wanted, logprobs, bend)

    def _reduce(
        self,
        scored: _Scored,
        chunk: Sequence[_Cut],
        # Per cut, places in it and slopes, [m] or [m, k]; all cuts whole if no places are named.
        steep: Sequence[tuple[Tensor | None, Tensor]],
        gradient: Tensor,  # [tokens, d]; rows are added to
    ) -> None:
        """Takes the chunk's logit gradient to the hidden state and to the adapters."""
        upstream = _wide(torch.cat([slopes for _, slopes in steep]))
        x, targets, bend = scored.x, scored.targets, scored.bend
        pairs = list(zip(steep, chunk, strict=True))
        named = [places + cut.part.start for (places, _), cut in pairs if places is not None]
        chosen = None
        if named:
            chosen = torch.cat(named)
            chosen = _filled(chosen, self.rows_computed(len(chosen)))
            x, targets = x[chosen], targets[chosen]
            bend = None if bend is None else bend[chosen]
        # None comes from what only fills up.
        upstream = functional.pad(upstream, (0, 0, 0, len(x) - len(upstream)))
        z = scored.softmax.gradient(chosen, _wide(targets), upstream)
        if bend is not None:
            z.mul_(bend)
        dz = z.to(x.dtype)
        linears = self._linear.together
        dx = linears.back([dz], linears.each)
        at = 0
        streams = []
        for ((places, slopes), cut), h in zip(pairs, scored.shrunk, strict=True):
            part, at = slice(at, at + len(slopes)), at + len(slopes)
            streams.append(cut.rows if places is None else cut.rows[places])
            if h is not None and len(slopes):
                own_h = h if places is None else h[places]
                dx[part].add_(adapter_backward(cut.segment, self._group, x[part], own_h, dz[part]))
        gradient.index_add_(0, torch.cat(streams), dx[:at])

    def _expand(self, x: Tensor, chunk: Sequence[_Cut]) -> tuple[Tensor, list[Tensor | None]]:
        """Logits [rows, V], not capped, and, per cut, x A^T [n, r] where the head is adapted."""
        linears = self._linear.together
        (z,) = linears.base(x, linears.each)
        shrunk: list[Tensor | None] = []
        for cut in chunk:
            h = None
            adapted = cut.segment.row is not None and cut.segment.row.trains(self._group)
            if adapted and self._row_wise:
                own = Adapted((Segment(0, len(cut.rows), cut.segment.row),), x.device, x.dtype)
                KERNELS.forward(x[cut.part], (z[cut.part],), own, self._group)
            elif adapted:
                h = adapter_forward(cut.segment, self._group, x[cut.part], z[cut.part])
            shrunk.append(h)
        return z, shrunk

    def _capped(self, z: Tensor) -> Tensor:  # [rows, V] -> [rows, V] float32
        z = z.float()
        return z if self.softcap is None else (z / self.softcap).tanh_().mul_(self.softcap)

    def _chunks(self, pieces: Sequence[Piece], targets: Sequence[Tensor]) -> Iterator[list[_Cut]]:
        """Cuts each piece by its own length alone, then fills chunks of rows with as many targets
        each.
        """
        chunk: list[_Cut] = []
        for number, piece in enumerate(pieces):
            for start in range(0, len(piece.rows), self.chunk_rows):
                place = slice(start, min(start + self.chunk_rows, len(piece.rows)))
                filled = chunk[-1].part.stop if chunk else 0
                full = filled + place.stop - start > self.chunk_rows
                width = targets[number].shape[1:]
                if chunk and (full or width != targets[chunk[-1].number].shape[1:]):
                    yield chunk
                    chunk = []
                _append(chunk, number, piece, place)
        if chunk:
            yield chunk


class _TargetLogprobs(torch.autograd.Function):
    """Overwrites the logits."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, targets: Tensor, kind: type[Softmax]) -> Tensor:
        at_target = z.gather(1, targets)
        ctx.softmax, ctx.targets = kind(z), targets
        logprobs: Tensor = ctx.softmax.logprobs(at_target)[:, 0]
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.softmax.gradient(None, ctx.targets, gradients[0][:, None]), None, None


def _append(chunk: list[_Cut], number: int, piece: Piece, place: slice) -> None:
    rows = piece.rows[place]
    if not piece.segment.rowwise:
        rows = _filled(rows, MIN_ROWS)
    start = chunk[-1].part.stop if chunk else 0
    chunk.append(_Cut(number, place, piece.segment, rows, slice(start, start + len(rows))))


def _wide(values: Tensor) -> Tensor:  # [n] or [n, k] -> [n, 1] or [n, k]
    return values[:, None] if values.dim() == 1 else values


def _filled(values: Tensor, rows: int) -> Tensor:  # [n, ...] -> [at least `rows`, ...]
    """With the first repeated."""
    missing = rows - len(values)
    if missing <= 0:
        return values
    return torch.cat([values, values[:1].expand(missing, *values.shape[1:])])


def _all_steep(slopes: Sequence[Tensor], chunk: Sequence[_Cut]) -> bool:
    """Whether the loss has a slope at every row of a chunk, and none only fills up."""
    if not all(len(cut.rows) == cut.count for cut in chunk):
        return False
    return bool(_sloping(torch.cat(list(slopes))).all())


def _steep_places(slope: Tensor) -> tuple[Tensor, Tensor]:  # [n] -> [m], [m]; [n, k] -> [m], [m, k]
    """Places in a cut where the loss has a slope, the first repeated to MIN_ROWS, and the slopes, 0
    for what fills up; or none.
    """
    places: Tensor = torch.nonzero(_sloping(slope))[:, 0]
    found = len(places)
    if not 0 < found < MIN_ROWS:
        return places, slope[places]
    places = _filled(places, MIN_ROWS)
    upstream: Tensor = slope[places]
    upstream[found:] = 0.0
    return places, upstream


def _sloping(slope: Tensor) -> Tensor:  # [n] or [n, k] -> [n]
    return (_wide(slope) != 0).any(1)
