"""Computes one pass: lays its spans side by side, sorted by adapter, and runs the model."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor

from mint_core.lora.bank import AdapterRow
from mint_core.lora.layers import MIN_ROWS, Segment
from mint_core.model.head import Piece
from mint_core.model.loading import LoadedBase
from sampler_service.engine.cache.cached_attention import CachedAttention, CachedRows
from sampler_service.engine.cache.kv_cache import KvCache
from sampler_service.engine.decoder import Decoder
from sampler_service.engine.drawing.randomness import Draw
from sampler_service.engine.drawing.sums import PLAIN, Sums
from sampler_service.engine.drawing.token_draws import DrawnTokens, draw_tokens
from sampler_service.engine.row_passes import RowPasses
from sampler_service.engine.sequences import Span, TokenSequence


@dataclass(frozen=True, slots=True, eq=False)
class Placed(CachedRows):
    """A span in the stream."""

    span: Span
    segment: Segment  # of its adapter


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """The last hidden states of a pass."""

    hidden: Tensor  # [rows, d]
    placed: tuple[Placed, ...]
    # By the decoder, of spans that are not among the placed: logits [n, V] float32, and whose.
    decoded: tuple[Tensor, list[TokenSequence]] | None = None
    # The experts that the rows went to, [rows, k] of each layer that has any, and those of the
    # decoder's. The next pass overwrites them.
    chosen: Sequence[Tensor] = ()
    decoded_chosen: Sequence[Tensor] = ()
    # To be called when the pass is not to be computed again.
    change_states: Callable[[], None] = lambda: None


@dataclass(slots=True, eq=False)
class Runner:
    """Runs passes over the base model and the adapters of the bank."""

    base: LoadedBase
    cache: KvCache
    progress: Callable[[], None]
    decoder: Decoder | None = None  # for spans that decode, and for short pieces of prompts

    def run(self, spans: Sequence[Span], adapters: Mapping[str, AdapterRow]) -> Computed:
        """Computes the spans' tokens and puts their keys and values into the cache."""
        own, rest = self._shared(spans)
        if self.decoder is None or not own:
            return self._run(rest, adapters)
        decoded = self.decoder.run(own, adapters)
        chosen = self.decoder.chosen
        self.progress()
        if not rest:
            return Computed(decoded[0].new_empty(0), (), decoded, decoded_chosen=chosen)
        return replace(self._run(rest, adapters), decoded=decoded, decoded_chosen=chosen)

    def _shared(self, spans: Sequence[Span]) -> tuple[list[Span], list[Span]]:
        """The decoder's spans, with pieces of prompts as far as it has room, and the others."""
        if self.decoder is None:
            return [], list(spans)
        own = [span for span in spans if span.decodes]
        rest: list[Span] = []
        room = self.decoder.most_rows - len(own)
        for span in spans:
            rows = span.stop - span.start
            if not span.decodes and rows <= room and self.decoder.takes(span):
                own.append(span)
                room -= rows
            elif not span.decodes:
                rest.append(span)
        return own, rest

    def _run(self, spans: Sequence[Span], adapters: Mapping[str, AdapterRow]) -> Computed:
        if self.decoder is not None and self.decoder.row_passes is not None:
            return self._run_rows(self.decoder.row_passes, spans, adapters)
        placed, segments = place(spans, adapters, self.base.min_rows)
        tokens = [0] * segments[-1].stop
        positions = [0] * segments[-1].stop
        for p in placed:
            start, stop = p.span.start, p.span.stop
            tokens[p.start : p.stop] = p.span.sequence.tokens(start, stop)
            positions[p.start : p.stop] = range(start, stop)
        device = self.base.device
        slots = [p.span.sequence.state for p in placed if p.span.sequence.state is not None]
        attention = CachedAttention(self.cache, device, placed, self.progress, slots)
        ids, places = (torch.tensor(each, device=device) for each in (tokens, positions))
        hidden = self.base.hidden(ids, places, segments, attention)
        routing = self.base.routing
        chosen = routing.chosen if routing else ()
        return Computed(hidden, placed, chosen=chosen, change_states=attention.change_states)

    def _run_rows(
        self, passes: RowPasses, spans: Sequence[Span], adapters: Mapping[str, AdapterRow]
    ) -> Computed:
        spans = sorted(spans, key=lambda span: span.sequence.adapter)
        placed: list[Placed] = []
        for span in spans:
            start = placed[-1].stop if placed else 0
            stop = start + span.stop - span.start
            segment = Segment(start, stop, adapters.get(span.sequence.adapter))
            placed.append(Placed(start, stop, span.sequence.blocks, span.stop, span, segment))
        return Computed(passes.hidden(spans, adapters, self.progress), tuple(placed))

    def logits(self, computed: Computed) -> tuple[Tensor, list[TokenSequence]]:
        """Logits [rows, V] float32 of the samples that decode, and whose each row is."""
        if computed.decoded is not None:
            return computed.decoded
        decoding = [p for p in computed.placed if p.span.decodes]
        pieces = [
            Piece(segment, torch.tensor([p.start for p in group], device=self.base.device))
            for segment, group in itertools.groupby(decoding, attrgetter("segment"))
        ]
        logits = self.base.head.logits(computed.hidden, pieces)
        return logits, [p.span.sequence for p in decoding]

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> DrawnTokens:
        """A token for each row of what `logits` returned."""
        drawn = self.decoder.draw(logits, draws) if self.decoder else None
        return drawn or draw_tokens(logits, draws, self.sums)

    @property
    def sums(self) -> Sums:
        return self.decoder.sums if self.decoder else PLAIN


def place(
    spans: Sequence[Span], adapters: Mapping[str, AdapterRow], min_rows: int
) -> tuple[tuple[Placed, ...], tuple[Segment, ...]]:
    """Lays spans side by side, an adapter's together. Spans of one token are segments of their own
    where these may be rowwise; others are followed by padding up to MIN_ROWS, since a matmul with
    fewer rows computes other last bits.
    """
    groups: dict[tuple[bool, str], list[Span]] = {}
    for span in sorted(spans, key=lambda s: s.sequence.adapter):
        rowwise = min_rows < MIN_ROWS and span.stop - span.start == 1
        groups.setdefault((rowwise, span.sequence.adapter), []).append(span)
    placed: list[Placed] = []
    segments: list[Segment] = []
    start = 0
    # Rowwise ones first: in a pass that has nothing else they are rows from 0 on.
    for (rowwise, adapter), group in sorted(groups.items(), key=lambda item: not item[0][0]):
        rows = sum(span.stop - span.start for span in group)
        rows = max(min_rows if rowwise else MIN_ROWS, rows)
        segment = Segment(start, start + rows, adapters.get(adapter), rowwise=rowwise)
        at = start
        for span in group:
            stop = at + span.stop - span.start
            placed.append(Placed(at, stop, span.sequence.blocks, span.stop, span, segment))
            at = stop
        segments.append(segment)
        start = segment.stop
    return tuple(placed), tuple(segments)
