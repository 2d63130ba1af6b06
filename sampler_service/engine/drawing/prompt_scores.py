"""Logprobs of prompt tokens, from the hidden states of the prompt's spans."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from mint_core.model.head import Head, Piece
from sampler_service.engine.drawing.randomness import alternative_uniforms
from sampler_service.engine.drawing.token_draws import draw_alternatives
from sampler_service.engine.runner import Computed, Placed
from sampler_service.jobs import Floats, Sampling, Tokens

ROWS = 128  # whose logits are held at once, where likeliest tokens or alternatives are wanted
_IdsAndLogprobs = tuple[Tensor, Tensor]  # both [rows, k]


@dataclass(frozen=True, slots=True)
class SpanScores:
    """Of consecutive positions, given the tokens before."""

    logprobs: Floats  # [positions]
    top_ids: Tokens  # [positions, k], likeliest first; k is 0 where they are not wanted
    top_logprobs: Floats  # [positions, k]
    targets: Floats  # [positions, targets], NaN where there is no target
    alternative_ids: Tokens  # [positions, alternatives], drawn at temperature 1
    alternative_logprobs: Floats  # [positions, alternatives]

    @classmethod
    def empty(cls, positions: int, asked: Sampling) -> "SpanScores":
        k, wanted = asked.topk_prompt_logprobs, asked.target_prompt_tokens
        return cls(
            np.empty(positions, np.float32),
            np.empty((positions, k), np.int64),
            np.empty((positions, k), np.float32),
            np.empty((positions, 0 if wanted is None else wanted.shape[1]), np.float32),
            np.empty((positions, asked.prompt_alternatives), np.int64),
            np.empty((positions, asked.prompt_alternatives), np.float32),
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
    asked: Sampling,
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
    if asked.target_prompt_tokens is not None:
        columns = np.concatenate([columns, asked.target_prompt_tokens[start : span.stop]], 1)
    targets = torch.from_numpy(np.maximum(columns, 0)).to(device)
    logprobs = head.logprobs(computed.hidden, [piece], [targets])[0].cpu().numpy()
    logprobs[columns < 0] = np.nan
    top = _top(head, computed.hidden, piece, asked.topk_prompt_logprobs)
    alternatives = _alternatives(head, computed.hidden, piece, range(start, span.stop), asked)
    return SpanScores(logprobs[:, 0], *_joined(top), logprobs[:, 1:], *_joined(alternatives))


def _top(head: Head, hidden: Tensor, piece: Piece, k: int) -> list[_IdsAndLogprobs]:
    """The k likeliest tokens of each row."""
    if not k:
        return _none(piece)
    return [
        head.likeliest(hidden, Piece(piece.segment, rows), k) for rows in piece.rows.split(ROWS)
    ]


def _alternatives(
    head: Head, hidden: Tensor, piece: Piece, positions: range, asked: Sampling
) -> list[_IdsAndLogprobs]:
    """Tokens that the model might have said after each of the positions, which are the rows'."""
    if not asked.prompt_alternatives:
        return _none(piece)
    drawn_by = alternative_uniforms(asked.choice.seed, positions, asked.prompt_alternatives)
    uniform = torch.from_numpy(drawn_by).to(hidden.device)
    return [
        draw_alternatives(head.logits(hidden, [Piece(piece.segment, rows)]), uniforms)
        for rows, uniforms in zip(piece.rows.split(ROWS), uniform.split(ROWS), strict=True)
    ]


def _none(piece: Piece) -> list[_IdsAndLogprobs]:
    none = torch.empty(len(piece.rows), 0)
    return [(none.long(), none)]


def _joined(parts: Sequence[_IdsAndLogprobs]) -> tuple[Tokens, Floats]:
    ids, logprobs = zip(*parts, strict=True)
    return torch.cat(ids).cpu().numpy(), torch.cat(logprobs).cpu().numpy()
