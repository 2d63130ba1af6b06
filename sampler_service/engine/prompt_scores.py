"""Logprobs of prompt tokens, from the hidden states of the prompt's spans."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from mint_core.model.head import Head, Piece
from sampler_service.engine.runner import Computed, Placed
from sampler_service.jobs import Floats, Generate, Tokens

TOP_ROWS = 128  # whose logits are held at once, where the likeliest tokens are wanted


@dataclass(frozen=True, slots=True)
class SpanScores:
    """Of consecutive positions, given the tokens before."""

    logprobs: Floats  # [positions]
    top_ids: Tokens  # [positions, k], likeliest first; k is 0 where they are not wanted
    top_logprobs: Floats  # [positions, k]
    targets: Floats  # [positions, targets], NaN where there is no target

    @classmethod
    def empty(cls, positions: int, job: Generate) -> "SpanScores":
        k, wanted = job.topk_prompt_logprobs, job.target_prompt_tokens
        return cls(
            np.empty(positions, np.float32),
            np.empty((positions, k), np.int64),
            np.empty((positions, k), np.float32),
            np.empty((positions, 0 if wanted is None else wanted.shape[1]), np.float32),
        )

    def put(self, at: int, scores: "SpanScores") -> None:
        """Takes in those of some of the positions, from `at` on."""
        for field in fields(self):
            part = getattr(scores, field.name)
            getattr(self, field.name)[at : at + len(part)] = part


def score_span(
    head: Head,
    computed: Computed,
    placed: Placed,
    first: int,  # position whose successor is the first to be scored
    job: Generate,
) -> SpanScores:
    """Scores what follows the span's positions from `first` on. All of it is in the prompt: a span
    ends before its last token.
    """
    span = placed.span
    start = max(first, span.start)
    device = computed.hidden.device
    rows = torch.arange(placed.start + start - span.start, placed.stop, device=device)
    piece = Piece(placed.segment, rows)
    columns = np.array(span.sequence.tokens(start + 1, span.stop + 1))[:, None]
    if job.target_prompt_tokens is not None:
        columns = np.concatenate([columns, job.target_prompt_tokens[start : span.stop]], 1)
    targets = torch.from_numpy(np.maximum(columns, 0)).to(device)
    logprobs = head.logprobs(computed.hidden, [piece], [targets])[0].cpu().numpy()
    logprobs[columns < 0] = np.nan
    ids, values = _top(head, computed.hidden, piece, job.topk_prompt_logprobs)
    return SpanScores(logprobs[:, 0], ids.cpu().numpy(), values.cpu().numpy(), logprobs[:, 1:])


def _top(head: Head, hidden: Tensor, piece: Piece, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row and their logprobs, both [rows, k]."""
    if not k:
        none = torch.empty(len(piece.rows), 0)
        return none.long(), none
    ids, values = [], []
    for rows in piece.rows.split(TOP_ROWS):
        top_ids, top_logprobs = head.likeliest(hidden, Piece(piece.segment, rows), k)
        ids.append(top_ids)
        values.append(top_logprobs)
    return torch.cat(ids), torch.cat(values)
