"""The output head: logprobs of chosen tokens, and their gradient, without a [tokens, vocabulary]
tensor.

Rows are scored in chunks, and each chunk's gradient is reduced before the next chunk is scored: the
logits are computed once. A row's numbers do not depend on the rows beside it: an adapter's rows are
cut by themselves alone, and every matmul has at least MIN_ROWS rows.

n: rows of a piece. r: stored rank. V: vocabulary size. d: hidden size. A row may be scored for k
targets at once: the logits are those of the row, whatever k is, and so is its softmax.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mint_core.lora.layers import (
    MIN_ROWS,
    MultiLoraLinear,
    Segment,
    adapter_backward,
    adapter_weights,
    scale,
)

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
    rows: Tensor  # [n, at least MIN_ROWS] positions in the stream, the first repeated to fill up
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
    powers: Tensor  # [rows, V], exp(logit - the row's largest)
    totals: Tensor  # [rows], their sums
    targets: Tensor  # [rows] or [rows, k]
    logprobs: Tensor  # as `targets`
    bend: Tensor | None  # [rows, V], derivative of the soft cap


class Head:
    """Scores rows of the last hidden state."""

    def __init__(self, linear: MultiLoraLinear, softcap: float | None = None) -> None:
        self._linear = linear
        self._softcap = softcap  # c: logits become c tanh(logit / c); None: they stay
        chunk_bytes = CHUNK_BYTES_CPU if linear.weight.device.type == "cpu" else CHUNK_BYTES
        self.chunk_rows = max(MIN_ROWS, min(2048, chunk_bytes // (4 * linear.out_features)))

    def logits(self, hidden: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """Logits of the pieces' rows, piece after piece, [rows, V] float32. For few rows: it does
        hold them all.
        """
        chunk: list[_Cut] = []
        for number, piece in enumerate(pieces):
            _append(chunk, number, piece, slice(0, len(piece.rows)))
        z, _ = self._expand(hidden[torch.cat([cut.rows for cut in chunk])], chunk)
        return torch.cat([z[cut.part][: cut.count] for cut in chunk])

    def all_logits(self, hidden: Tensor) -> Tensor:  # [rows, d] -> [rows, V] float32
        """Logits of every row, with what the layers' context applies. For few rows, as `logits`."""
        return self._capped(self._linear(hidden))

    @torch.no_grad()
    def likeliest(self, hidden: Tensor, piece: Piece, k: int) -> tuple[Tensor, Tensor]:
        """Ids and logprobs of the k likeliest tokens of each row, [n, k], bit for bit as `logprobs`
        scores them. For few rows, as `logits`.
        """
        z = self.logits(hidden, [piece])
        top = z.topk(k, dim=1)
        largest, _, totals = _powers(z)
        return top.indices, top.values - largest[:, None] - totals.log()[:, None]

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
            steep = [
                _steep_rows(upstream, cut) for upstream, cut in zip(slopes, chunk, strict=True)
            ]
            if any(len(rows) for rows in steep):
                gradient = torch.zeros_like(hidden) if gradient is None else gradient
                self._reduce(scored, chunk, slopes, steep, gradient)
        return gradient

    def _score(self, hidden: Tensor, chunk: Sequence[_Cut], targets: Sequence[Tensor]) -> _Scored:
        x = hidden[torch.cat([cut.rows for cut in chunk])]
        z, shrunk = self._expand(x, chunk)
        wanted = torch.cat([_filled(targets[cut.number][cut.place], cut) for cut in chunk])
        bend = None if self._softcap is None else 1 - (z / self._softcap).square()
        at_target = z.gather(1, _wide(wanted))
        largest, powers, totals = _powers(z)
        logprobs = (at_target - largest[:, None] - totals.log()[:, None]).view(wanted.shape)
        return _Scored(x, shrunk, powers, totals, wanted, logprobs, bend)

    def _reduce(
        self,
        scored: _Scored,
        chunk: Sequence[_Cut],
        slopes: Sequence[Tensor],  # per cut, [n] or [n, k]
        steep: Sequence[Tensor],  # per cut, places in the chunk
        gradient: Tensor,  # [tokens, d]; rows are added to
    ) -> None:
        """Takes the chunk's logit gradient upstream * (onehot(target) - softmax(z)), summed over a
        row's targets, to the hidden state and to the adapters. Overwrites the chunk's powers.
        """
        chosen = torch.cat(list(steep))
        upstream = _wide(
            torch.cat([_upstream(*pair) for pair in zip(slopes, steep, chunk, strict=True)])
        )
        powers, x = scored.powers, scored.x
        if not torch.equal(chosen, torch.arange(len(powers), device=chosen.device)):
            powers, x = powers[chosen], x[chosen]
        z = powers.mul_(-(_row_sums(upstream) / scored.totals[chosen])[:, None])
        z.scatter_add_(1, _wide(scored.targets[chosen]), upstream)
        if scored.bend is not None:
            z.mul_(scored.bend[chosen])
        dz = z.to(x.dtype)
        dx = dz @ self._linear.weight
        at = 0
        for cut, rows, h in zip(chunk, steep, scored.shrunk, strict=True):
            part, at = slice(at, at + len(rows)), at + len(rows)
            if not len(rows):
                continue
            if h is not None:
                dx[part] += adapter_backward(
                    cut.segment, self._linear.name, x[part], h[rows - cut.part.start], dz[part]
                )
            gradient.index_add_(0, cut.rows[rows - cut.part.start], dx[part])

    def _expand(self, x: Tensor, chunk: Sequence[_Cut]) -> tuple[Tensor, list[Tensor | None]]:
        """Logits [rows, V] in float32 and, per cut, x A^T [n, r] where the head is adapted."""
        z = functional.linear(x, self._linear.weight, self._linear.bias)
        shrunk: list[Tensor | None] = []
        for cut in chunk:
            h = None
            if cut.segment.row is not None and self._linear.name in cut.segment.row.modules:
                a, b = adapter_weights(cut.segment, self._linear.name, x.dtype)
                h = x[cut.part] @ a.T
                z[cut.part].addmm_(h, b.T, alpha=scale(cut.segment))
            shrunk.append(h)
        return self._capped(z), shrunk

    def _capped(self, z: Tensor) -> Tensor:  # [rows, V] -> [rows, V] float32
        z = z.float()
        return z if self._softcap is None else (z / self._softcap).tanh_().mul_(self._softcap)

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
                if chunk and (full or _width(targets, number) != _width(targets, chunk[-1].number)):
                    yield chunk
                    chunk = []
                _append(chunk, number, piece, place)
        if chunk:
            yield chunk


def _powers(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest of each row, [rows], exp(z - largest), [rows, V], and its sums. Overwrites z."""
    largest = z.amax(1)
    powers = z.sub_(largest[:, None]).exp_()
    return largest, powers, powers.sum(1)


def _append(chunk: list[_Cut], number: int, piece: Piece, place: slice) -> None:
    rows = piece.rows[place]
    missing = MIN_ROWS - len(rows)
    if missing > 0:
        rows = torch.cat([rows, rows[:1].expand(missing)])
    start = chunk[-1].part.stop if chunk else 0
    chunk.append(_Cut(number, place, piece.segment, rows, slice(start, start + len(rows))))


def _wide(values: Tensor) -> Tensor:  # [n] or [n, k] -> [n, 1] or [n, k]
    return values[:, None] if values.dim() == 1 else values


def _width(targets: Sequence[Tensor], number: int) -> tuple[int, ...]:
    return tuple(targets[number].shape[1:])


def _row_sums(values: Tensor) -> Tensor:  # [n, k] -> [n]
    """Column after column: a row's sum does not depend on how many rows there are."""
    total = values[:, 0]
    for column in range(1, values.shape[1]):
        total = total + values[:, column]
    return total


def _filled(targets: Tensor, cut: _Cut) -> Tensor:  # [n, ...] -> [n, at least MIN_ROWS, ...]
    missing = len(cut.rows) - len(targets)
    if not missing:
        return targets
    return torch.cat([targets, targets[:1].expand(missing, *targets.shape[1:])])


def _steep_rows(slope: Tensor, cut: _Cut) -> Tensor:
    """Places in the chunk where the loss has a slope, the first repeated to MIN_ROWS; or none."""
    places: Tensor = torch.nonzero(_sloping(slope))[:, 0] + cut.part.start
    missing = MIN_ROWS - len(places)
    if missing > 0 and len(places):
        places = torch.cat([places, places[:1].expand(missing)])
    return places


def _upstream(slope: Tensor, steep: Tensor, cut: _Cut) -> Tensor:
    """The slopes of the steep rows; 0 for those that fill up."""
    upstream: Tensor = slope[steep - cut.part.start]
    upstream[int(_sloping(slope).sum()) :] = 0.0
    return upstream


def _sloping(slope: Tensor) -> Tensor:  # [n] or [n, k] -> [n]
    return (_wide(slope) != 0).any(1)
