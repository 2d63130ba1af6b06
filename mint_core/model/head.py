"""The output head: logprobs of chosen tokens, and their gradient, without a [tokens, vocabulary]
tensor.

Rows are scored in chunks. A row's numbers do not depend on the rows beside it: an adapter's rows
are cut by themselves alone, and every matmul has at least MIN_ROWS rows.

n: rows of a piece. r: stored rank. V: vocabulary size. d: hidden size.
"""

from collections.abc import Iterator, Sequence
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

CHUNK_BYTES = 256 * 1024**2  # of float32 logits


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows of one segment that are scored together."""

    segment: Segment
    rows: Tensor  # [n] positions in the stream


class Head:
    """Scores rows of the last hidden state."""

    def __init__(self, linear: MultiLoraLinear, softcap: float | None = None) -> None:
        self._linear = linear
        self._softcap = softcap  # c: logits become c tanh(logit / c); None: they stay
        self._chunk_rows = max(MIN_ROWS, min(2048, CHUNK_BYTES // (4 * linear.out_features)))

    def logits(self, hidden: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """Logits of the pieces' rows, piece after piece, [rows, V] float32. For few rows: it does
        hold them all.
        """
        padded = [_padded(piece) for piece in pieces]
        x = hidden[torch.cat(padded)]
        z, _ = self._expand(x, pieces, padded)
        return torch.cat(
            [
                part[: len(p.rows)]
                for part, p in zip(z.split([len(r) for r in padded]), pieces, strict=True)
            ]
        )

    @torch.no_grad()
    def logprobs(
        self,
        hidden: Tensor,  # [tokens, d]
        pieces: Sequence[Piece],
        targets: Sequence[Tensor],  # per piece, [n]
    ) -> list[Tensor]:  # per piece, [n] float32
        """Natural logarithm of each row's target probability."""
        results = [torch.empty(len(piece.rows), device=hidden.device) for piece in pieces]
        for chunk in self._chunks(pieces):
            cut = [piece for _, _, piece in chunk]
            padded = [_padded(piece) for piece in cut]
            z, _ = self._expand(hidden[torch.cat(padded)], cut, padded)
            wanted = [
                _fill(targets[i][at], rows) for (i, at, _), rows in zip(chunk, padded, strict=True)
            ]
            scores = z.gather(1, torch.cat(wanted)[:, None])[:, 0] - z.logsumexp(1)
            sizes = [len(rows) for rows in padded]
            for (i, at, piece), score in zip(chunk, scores.split(sizes), strict=True):
                results[i][at] = score[: len(piece.rows)]
        return results

    @torch.no_grad()
    def backward(
        self,
        hidden: Tensor,  # [tokens, d]
        pieces: Sequence[Piece],
        targets: Sequence[Tensor],  # per piece, [n]
        upstream: Sequence[Tensor],  # per piece, [n]: d loss / d logprob
    ) -> Tensor:  # [tokens, d]
        """d loss / d hidden; adds the gradients of the head's adapters."""
        result = torch.zeros_like(hidden)
        for chunk in self._chunks(pieces):
            cut = [piece for _, _, piece in chunk]
            padded = [_padded(piece) for piece in cut]
            x = hidden[torch.cat(padded)]
            z, shrunk = self._expand(x, cut, padded)
            wanted = [
                _fill(targets[i][at], rows) for (i, at, _), rows in zip(chunk, padded, strict=True)
            ]
            slopes = [
                _zero_fill(upstream[i][at], rows)
                for (i, at, _), rows in zip(chunk, padded, strict=True)
            ]
            bend = None if self._softcap is None else 1 - (z / self._softcap).square()
            dz = _logit_gradient(z, torch.cat(wanted), torch.cat(slopes))
            dz = (dz if bend is None else dz.mul_(bend)).to(x.dtype)
            dx = dz @ self._linear.weight
            at = 0
            for piece, rows, h in zip(cut, padded, shrunk, strict=True):
                part = slice(at, at + len(rows))
                if h is not None:
                    dx[part] += adapter_backward(
                        piece.segment, self._linear.name, x[part], h, dz[part]
                    )
                result[piece.rows] = dx[part][: len(piece.rows)]
                at += len(rows)
        return result

    def _expand(
        self, x: Tensor, pieces: Sequence[Piece], padded: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Logits [rows, V] in float32 and, per piece, x A^T [n, r] where the head is adapted."""
        z = functional.linear(x, self._linear.weight, self._linear.bias)
        shrunk: list[Tensor | None] = []
        at = 0
        for piece, rows in zip(pieces, padded, strict=True):
            part = slice(at, at + len(rows))
            h = None
            if piece.segment.row is not None and self._linear.name in piece.segment.row.modules:
                a, b = adapter_weights(piece.segment, self._linear.name, x.dtype)
                h = x[part] @ a.T
                z[part].addmm_(h, b.T, alpha=scale(piece.segment))
            shrunk.append(h)
            at += len(rows)
        z = z.float()
        if self._softcap is not None:
            z = (z / self._softcap).tanh_().mul_(self._softcap)
        return z, shrunk

    def _chunks(self, pieces: Sequence[Piece]) -> Iterator[list[tuple[int, slice, Piece]]]:
        """Cuts each piece by its own length alone, then fills chunks: (piece number, place in it,
        cut piece).
        """
        chunk: list[tuple[int, slice, Piece]] = []
        filled = 0
        for i, piece in enumerate(pieces):
            for start in range(0, len(piece.rows), self._chunk_rows):
                at = slice(start, min(start + self._chunk_rows, len(piece.rows)))
                rows = piece.rows[at]
                if chunk and filled + len(rows) > self._chunk_rows:
                    yield chunk
                    chunk, filled = [], 0
                chunk.append((i, at, Piece(piece.segment, rows)))
                filled += len(rows)
        if chunk:
            yield chunk


def _padded(piece: Piece) -> Tensor:
    """The piece's rows, the first repeated until there are MIN_ROWS."""
    missing = MIN_ROWS - len(piece.rows)
    return torch.cat([piece.rows, piece.rows[:1].expand(missing)]) if missing > 0 else piece.rows


def _fill(targets: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([targets, targets[:1].expand(len(rows) - len(targets))])


def _zero_fill(upstream: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([upstream, upstream.new_zeros(len(rows) - len(upstream))])


def _logit_gradient(z: Tensor, targets: Tensor, upstream: Tensor) -> Tensor:
    """d loss / d logits [rows, V] = upstream * (onehot(target) - softmax(z)). Overwrites z."""
    z.sub_(z.logsumexp(1, keepdim=True)).exp_()
    z.mul_(-upstream[:, None])
    z.scatter_add_(1, targets[:, None], upstream[:, None])
    return z
