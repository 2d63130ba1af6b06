"""Logprobs of prompt tokens, from the hidden states of the prompt's spans."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mint_core.model.head import Head, Piece
from sampler_service.engine.drawing.randomness import alternative_uniforms
from sampler_service.engine.drawing.sums import PLAIN, Sums
from sampler_service.engine.drawing.token_draws import draw_alternatives
from sampler_service.engine.runner import Computed, Placed
from sampler_service.jobs import Floats, Sampling, TokenLogprobs, Tokens

ROWS = 128  # whose logits are held at once, where likeliest tokens or alternatives are wanted
_IdsAndLogprobs = tuple[Tensor, Tensor]  # both [rows, k]


def empty_scores(positions: int, asked: Sampling) -> TokenLogprobs:
    """Room for what `score_span` makes."""
    shape = positions, _starts(asked)[-1] + asked.prompt_alternatives
    return TokenLogprobs(token_ids=np.empty(shape, np.int64), logprobs=np.empty(shape, np.float32))


def split_scores(scores: TokenLogprobs, asked: Sampling) -> list[TokenLogprobs]:
    """Of the prompt's own tokens, of targets, of the likeliest, and of those drawn at temperature
    1. What is not asked for has no columns.
    """
    ids, logprobs = scores.token_ids, scores.logprobs
    return [
        TokenLogprobs(token_ids=ids[:, start:stop], logprobs=logprobs[:, start:stop])
        for start, stop in pairwise([0, *_starts(asked), None])
    ]


def _starts(asked: Sampling) -> list[int]:
    """The columns at which targets, likeliest and drawn tokens begin."""
    targets = asked.target_prompt_tokens
    likeliest = 1 if targets is None else 1 + targets.shape[1]
    return [1, likeliest, likeliest + asked.topk_prompt_logprobs]


def score_span(
    head: Head,
    computed: Computed,
    placed: Placed,
    first: int,  # position whose successor is the first to be scored
    asked: Sampling,
    sums: Sums = PLAIN,
) -> TokenLogprobs:
    """Scores what follows the span's positions from `first` on. All of it is in the prompt: a span
    ends before its last token. Where there is no target, -1 and NaN stand for it.
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
    parts = [(columns, logprobs)]
    if k := asked.topk_prompt_logprobs:
        parts.append(_joined(_top(head, computed.hidden, piece, k)))
    if asked.prompt_alternatives:
        positions = range(start, span.stop)
        parts.append(_joined(_alternatives(head, computed.hidden, piece, positions, asked, sums)))
    ids, values = (np.concatenate(each, 1) for each in zip(*parts, strict=True))
    return TokenLogprobs(token_ids=ids, logprobs=values)


def _top(head: Head, hidden: Tensor, piece: Piece, k: int) -> list[_IdsAndLogprobs]:
    """The k likeliest tokens of each row."""
    return [
        head.likeliest(hidden, Piece(piece.segment, rows), k) for rows in piece.rows.split(ROWS)
    ]


def _alternatives(
    head: Head, hidden: Tensor, piece: Piece, positions: range, asked: Sampling, sums: Sums
) -> list[_IdsAndLogprobs]:
    """Tokens that the model might have said after each of the positions, which are the rows'."""
    drawn_by = alternative_uniforms(asked.choice.seed, positions, asked.prompt_alternatives)
    uniform = torch.from_numpy(drawn_by).to(hidden.device)
    return [
        draw_alternatives(head.logits(hidden, [Piece(piece.segment, rows)]), uniforms, sums)
        for rows, uniforms in zip(piece.rows.split(ROWS), uniform.split(ROWS), strict=True)
    ]


def _joined(parts: Sequence[_IdsAndLogprobs]) -> tuple[Tokens, Floats]:
    ids, logprobs = zip(*parts, strict=True)
    return torch.cat(ids).cpu().numpy(), torch.cat(logprobs).cpu().numpy()
