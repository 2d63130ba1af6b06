"""Logprobs of prompt tokens, from the hidden states of the prompt's spans."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mint_core.model.head import Head, Piece
from sampler_service.engine.runner import Computed, Placed

TOP_ROWS = 128  # whose logits are held at once, where the likeliest tokens are wanted


@dataclass(frozen=True, slots=True)
class SpanScores:
    """Of consecutive positions."""

    logprobs: NDArray[np.float32]  # [positions] of the token that follows each
    top_ids: NDArray[np.int64] | None = None  # [positions, k], likeliest first
    top_logprobs: NDArray[np.float32] | None = None  # [positions, k]


def score_span(head: Head, computed: Computed, placed: Placed, top_k: int) -> SpanScores:
    """Scores the tokens that follow the span's. They are in the prompt: a span ends before its last
    token.
    """
    span = placed.span
    device = computed.hidden.device
    targets = torch.tensor(span.sequence.tokens(span.start + 1, span.stop + 1), device=device)
    piece = Piece(placed.segment, torch.arange(placed.start, placed.stop, device=device))
    logprobs = head.logprobs(computed.hidden, [piece], [targets])[0].cpu().numpy()
    if not top_k:
        return SpanScores(logprobs)
    ids, values = _top(head, computed.hidden, piece, top_k)
    return SpanScores(logprobs, ids.cpu().numpy(), values.cpu().numpy())


def _top(head: Head, hidden: Tensor, piece: Piece, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row and their logprobs, both [rows, k]."""
    ids, values = [], []
    for rows in piece.rows.split(TOP_ROWS):
        top_ids, top_logprobs = head.likeliest(hidden, Piece(piece.segment, rows), k)
        ids.append(top_ids)
        values.append(top_logprobs)
    return torch.cat(ids), torch.cat(values)
