"""Prompts computed as what decodes is: each row by itself, beside what the cache holds of those
before it. Then a row's bits depend on no cut, and on no neighbour: a beginning that is found, or
computed again, is what it would have been.

n: rows of a pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mint_core.lora.bank import AdapterRow
from mint_core.lora.columns import ColumnBank
from mint_core.model.loading import LoadedBase
from sampler_service.engine.cache.blocks import BLOCK_TOKENS, blocks_for
from sampler_service.engine.cache.kv_cache import KvCache
from sampler_service.engine.cache.paged_attention import DecodeAttention, PagedAttention
from sampler_service.engine.sequences import Span

MOST_ROWS = 512  # of a pass, of which attention keeps parts by heads and splits


@dataclass(frozen=True, slots=True, eq=False)
class RowPasses:
    """Passes that are launched, and tell hidden states."""

    base: LoadedBase
    cache: KvCache
    attention: Callable[[Sequence[tuple[int, int]]], DecodeAttention]  # of rows of these spans
    columns: ColumnBank

    def hidden(
        self,
        spans: Sequence[Span],
        adapters: Mapping[str, AdapterRow],
        progress: Callable[[], None],  # called after each pass
    ) -> Tensor:  # [tokens of the spans, d], in their order
        parts = []
        for part in fitting(spans, adapters, self.columns, MOST_ROWS):
            parts.append(self._pass(part, adapters))
            progress()
        return torch.cat(parts)

    def _pass(self, spans: Sequence[Span], adapters: Mapping[str, AdapterRow]) -> Tensor:
        rows = [adapters.get(span.sequence.adapter) for span in spans]
        columns = self.columns.admit([row for row in dict.fromkeys(rows) if row is not None])
        assert columns is not None, "a part fits"
        device, longest = self.base.device, max(blocks_for(span.stop) for span in spans)
        tokens: list[int] = []
        numbers: list[tuple[int, int, int]] = []  # of each row: span, position, owner
        table = []  # of each span
        for place, (span, row) in enumerate(zip(spans, rows, strict=True)):
            own = span.sequence.blocks[: blocks_for(span.stop)]
            table.append(own + own[-1:] * (longest - len(own)))
            tokens += span.sequence.tokens(span.start, span.stop)
            owner = self.columns.owner(row)
            numbers += [(place, at, owner) for at in range(span.start, span.stop)]
        ids = torch.tensor(tokens, device=device)
        places, positions, owners = torch.tensor(numbers, device=device).t().contiguous()
        blocks = torch.tensor(table, dtype=torch.int32, device=device)[places]  # [n, longest]
        last = blocks.gather(1, positions[:, None] // BLOCK_TOKENS)[:, 0].long()
        slots = last * BLOCK_TOKENS + positions % BLOCK_TOKENS
        attend = self.attention([(span.start, span.stop) for span in spans])
        attention = PagedAttention(self.cache, attend, slots, blocks, positions + 1, places)
        active = self.columns.active(owners, columns) if columns else None
        with self.base.context.side_by_side(active):
            return self.base.hidden(ids, positions, (), attention)


def fitting(
    spans: Sequence[Span],
    adapters: Mapping[str, AdapterRow],
    columns: ColumnBank,
    most_rows: int,
) -> Iterator[list[Span]]:
    """Spans in their order, in parts of at most so many rows, and of adapters that can be hot at
    the same time; longer ones are cut.
    """
    part: list[Span] = []
    count, hot = 0, set[AdapterRow]()
    for span in spans:
        row, start = adapters.get(span.sequence.adapter), span.start
        own: set[AdapterRow] = set() if row is None else {row}
        while start < span.stop:
            if part and (count == most_rows or not (own <= hot or columns.fits(hot | own))):
                yield part
                part, count, hot = [], 0, set()
            hot |= own
            stop = min(span.stop, start + most_rows - count)
            part.append(replace(span, start=start, stop=stop))
            count, start = count + stop - start, stop
    if part:
        yield part
