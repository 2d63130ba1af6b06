"""Decoding on an accelerator: passes in which each row is a token of a sequence that attends to
all before it. A sequence that decodes has one row; a short piece of a prompt has some, which enter
the cache before any of them attends.

Such a pass is recorded for each number of rows that is a power of two; rows that are missing are
filled up. Elsewhere the same code runs without being recorded.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mint_core.lora import kernels
from mint_core.lora.bank import AdapterRow
from mint_core.lora.columns import MOST_COLUMNS, NOBODY, ColumnBank
from mint_core.lora.segments import Segment
from mint_core.model.head import Piece
from mint_core.model.loading import LoadedBase
from mint_core.model.recordings import GraphRecorder, Inputs, Recordings, reads_lengths
from sampler_service.engine.cache.blocks import BLOCK_TOKENS, blocks_for
from sampler_service.engine.cache.kv_cache import KvCache
from sampler_service.engine.cache.paged_attention import (
    DecodeAttention,
    PagedAttention,
    plain_attention,
)
from sampler_service.engine.drawing.randomness import Draw
from sampler_service.engine.drawing.recorded_draws import RecordedDraws
from sampler_service.engine.drawing.sums import Sums
from sampler_service.engine.drawing.token_draws import DrawnTokens
from sampler_service.engine.row_passes import RowPasses, fitting
from sampler_service.engine.sequences import Span, TokenSequence

# Of a prompt. Each row reads the keys of all before it by itself, so that this is bounded as well.
MOST_PIECE, MOST_READ = 128, 2**18
_NUMBERS = ("tokens", "positions", "slots", "lengths", "owners", "states")  # of a row
# Of a row of the table: whose blocks it has, how many, and the last one.
_Sent = tuple[list[int], int, int]


class DecodeRows:
    """What a pass reads, in tensors that stay where they are."""

    def __init__(
        self, most: int, most_blocks: int, scratch_block: int, scratch_slot: int, base: LoadedBase
    ) -> None:
        self._inputs = Inputs(dict.fromkeys(_NUMBERS, (torch.int64, (most,))), base.device)
        self.numbers = self._inputs.device  # each [most]
        self.table = torch.zeros(most, most_blocks, dtype=torch.int32, device=base.device)
        self._sent: list[_Sent | None] = [None] * most
        self._scratch = (0, 0, scratch_block * BLOCK_TOKENS, 1, NOBODY, scratch_slot)
        self._scratch_blocks = [scratch_block]

    def fill(self, spans: Sequence[Span], owners: Sequence[int], size: int) -> None:
        """Takes rows in, and fills up to `size` with rows that read and write the scratch block."""
        tokens, slots, states, blocks = [], [], [], []
        positions: list[int] = []
        for span in spans:
            sequence, own = span.sequence, span.sequence.blocks
            tokens += sequence.tokens(span.start, span.stop)
            for at in range(span.start, span.stop):
                positions.append(at)
                slots.append(own[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS)
                states.append(sequence.state or 0)
                blocks.append((own, blocks_for(at + 1)))
        count, lengths = len(tokens), [at + 1 for at in positions]
        columns = zip(
            (tokens, positions, slots, lengths, owners, states), self._scratch, strict=True
        )
        for numbers, (own_numbers, filler) in zip(self._inputs.host.values(), columns, strict=True):
            numbers[:count] = own_numbers
            numbers[count:size] = filler
        self._inputs.send()
        self._send(blocks + [(self._scratch_blocks, 1)] * (size - count))

    def _send(self, blocks: Sequence[tuple[list[int], int]]) -> None:
        """Of the table only what is read and changed is sent: a sequence has a new block once in
        BLOCK_TOKENS passes. Of the blocks that it has only the last one is ever replaced.
        """
        changed = []
        for i, (own, count) in enumerate(blocks):
            sent, last = self._sent[i], own[count - 1]
            if sent is None or sent[0] is not own or sent[1:] != (count, last):
                changed.append(i)
                self._sent[i] = own, count, last
        if not changed:
            return
        longest = max(blocks[i][1] for i in changed)
        filler = self._scratch_blocks
        table = [
            own[:count] + filler * (longest - count) for own, count in (blocks[i] for i in changed)
        ]
        device = self.table.device
        rows = torch.tensor(table, dtype=torch.int32).to(device)
        self.table[:, :longest].index_copy_(0, torch.tensor(changed, device=device), rows)


class Decoder:
    """Computes the spans of a step that decode."""

    def __init__(
        self,
        base: LoadedBase,
        cache: KvCache,
        *,
        most_rows: int,
        most_blocks: int,  # of a sequence
        scratch_block: int,  # of the cache; nobody else's
        columns: int = MOST_COLUMNS,
        attend: DecodeAttention | None = None,  # None: what is best on the base's device
    ) -> None:
        self._base = base
        self._cache = cache
        self._attend = attend or _attention_of(base.device)
        scratch_slot = cache.states.slots - 1  # nobody else's
        self._rows = DecodeRows(most_rows, most_blocks, scratch_block, scratch_slot, base)
        row_wise = base.context.row_wise
        self._columns = ColumnBank(base.groups, columns, base.device, base.dtype, row_wise=row_wise)
        # Of prompts, where a row's bits must depend on no other.
        self.row_passes: RowPasses | None = None
        if row_wise:
            from sampler_service.engine.cache.paged_kernels import tiled  # Triton is not everywhere

            of_rows = partial(tiled, self._attend, base.device)
            self.row_passes = RowPasses(base, cache, of_rows, self._columns)
            self._attend = of_rows([(0, 1)] * most_rows)
        self.sums = Sums(row_wise)
        vocabulary_size = base.description.vocabulary_size
        self._logits = torch.zeros(most_rows, vocabulary_size, device=base.device)
        self.most_rows = most_rows
        recorded = base.device.type == "cuda" and not reads_on_host(base)
        recorder = GraphRecorder(base.device) if recorded else None
        self.recordings = Recordings(recorder)
        self._draws = RecordedDraws(self._logits, recorder, self.sums)
        # Of the last pass the experts of its rows, [rows, k] of each layer that has any.
        self.chosen: list[Tensor] = []
        self._chosen: dict[tuple[int, int], list[Tensor]] = {}  # by rows and columns of a pass

    def takes(self, span: Span) -> bool:
        """Whether a pass may compute a span beside those that decode: what it draws from is all
        that it tells of a token, and no token may wait for the one before it.
        """
        length = span.stop - span.start
        short = length <= MOST_PIECE and length * span.stop <= MOST_READ
        told = span.sequence.reusable is not None or self._base.routing is not None
        return short and not told and not self._base.mixers

    def run(
        self, spans: Sequence[Span], adapters: Mapping[str, AdapterRow]
    ) -> tuple[Tensor, list[TokenSequence]]:
        """Computes the tokens of spans, of at most `most_rows` and at least one. Returns, of those
        that decode, logits [n, V] float32, which the next pass overwrites, and whose each row is.
        """
        spans = sorted(spans, key=lambda span: (not span.decodes, span.sequence.adapter))
        if self.row_passes is not None:
            parts = list(fitting(spans, adapters, self._columns, self.most_rows))
            if len(parts) > 1:
                logits = torch.cat([self.run(part, adapters)[0].clone() for part in parts])
                return logits, [span.sequence for span in spans if span.decodes]
        rows = [
            adapters.get(span.sequence.adapter)
            for span in spans
            for _ in range(span.start, span.stop)
        ]
        begun = [span.sequence.state or 0 for span in spans if not span.start]
        if begun and self._base.mixers:
            self._cache.states.clear(torch.tensor(begun, device=self._base.device))
        columns = self._columns.admit([row for row in dict.fromkeys(rows) if row is not None])
        if columns is None:
            logits = self._run_grouped(spans, rows)
        else:
            size = min(1 << (len(rows) - 1).bit_length(), self.most_rows)
            self._rows.fill(spans, [self._columns.owner(row) for row in rows], size)
            self.recordings.run_anyhow((size, columns), partial(self._compute, size, columns))
            self.chosen = self._chosen.get((size, columns), [])
            logits = self._logits
        drawing = [span.sequence for span in spans if span.decodes]
        return logits[: len(drawing)], drawing

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> DrawnTokens | None:
        """A token for each row of what `run` returned; None if that takes more than is recorded."""
        return self._draws.draw(logits, draws)

    def forget_adapters(self) -> None:
        """Holds none any more, hot or not."""
        self._columns.clear()

    def _compute(self, size: int, columns: int) -> None:
        """Reads and writes tensors that stay where they are. Nothing is read on the host."""
        active = (
            self._columns.active(self._rows.numbers["owners"][:size], columns) if columns else None
        )
        with self._base.context.side_by_side(active):
            self._logits[:size] = self._base.head.all_logits(self._hidden(size))
        if self._base.routing:
            self._chosen[size, columns] = self._base.routing.chosen

    def _run_grouped(self, spans: Sequence[Span], rows: Sequence[AdapterRow | None]) -> Tensor:
        """A pass over more adapters than there are columns: an adapter's rows side by side."""
        self._rows.fill(spans, [NOBODY] * len(rows), len(rows))
        segments: list[Segment] = []
        for row, group in itertools.groupby(rows):
            start = segments[-1].stop if segments else 0
            segments.append(Segment(start, start + len(list(group)), row))
        hidden = self._hidden(len(rows), segments)
        self.chosen = self._base.routing.chosen if self._base.routing else []
        places = torch.arange(len(rows), device=hidden.device)
        return self._base.head.logits(hidden, [Piece(s, places[s.rows]) for s in segments])

    def _hidden(self, size: int, segments: Sequence[Segment] = ()) -> Tensor:  # [size, d]
        """The last hidden states of the first rows."""
        own = (numbers[:size] for numbers in self._rows.numbers.values())
        tokens, positions, slots, lengths, _, states = own
        table = self._rows.table[:size]
        attention = PagedAttention(self._cache, self._attend, slots, table, lengths, states)
        return self._base.hidden(tokens, positions, tuple(segments), attention)


def reads_on_host(base: LoadedBase) -> bool:
    """Whether a pass reads on the host what it has computed: it cannot be recorded then. Grouped
    products of experts do but for bfloat16.
    """
    grouped = base.routing is not None and base.dtype != torch.bfloat16
    return grouped or reads_lengths(base.text.config)


def _attention_of(device: torch.device) -> DecodeAttention:
    if not kernels.run_on(device):
        return plain_attention
    # Here, since Triton is not everywhere.
    from sampler_service.engine.cache.paged_kernels import paged_attention

    return paged_attention
