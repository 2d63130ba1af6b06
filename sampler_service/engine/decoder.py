"""Decoding on an accelerator: passes in which each sequence computes its last token.

Such a pass is thousands of small kernels, and launching them one by one takes longer than they
run. So it is recorded, in a CUDA graph, for each number of rows that is a power of two, and
replayed over tensors that stay where they are; rows that are missing are filled up. Elsewhere the
same code runs without being recorded.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mint_core.lora.bank import AdapterRow
from mint_core.lora.columns import MOST_COLUMNS, NOBODY, ColumnBank
from mint_core.lora.segments import Segment
from mint_core.model.head import Piece
from mint_core.model.loading import LoadedBase
from sampler_service.engine.cache.blocks import BLOCK_TOKENS, blocks_for
from sampler_service.engine.cache.kv_cache import KvCache
from sampler_service.engine.cache.paged_attention import (
    DecodeAttention,
    PagedAttention,
    plain_attention,
)
from sampler_service.engine.sequences import Span, TokenSequence


class DecodeRows:
    """What a pass reads, in tensors that stay where they are."""

    def __init__(
        self, most: int, most_blocks: int, scratch_block: int, scratch_slot: int, base: LoadedBase
    ) -> None:
        self._scratch_block, self._scratch_slot = scratch_block, scratch_slot
        self._numbers = torch.zeros(6, most, dtype=torch.int64, device=base.device)
        self.tokens, self.positions, self.slots, self.lengths = self._numbers[:4]
        self.owners, self.states = self._numbers[4:]
        self.table = torch.zeros(most, most_blocks, dtype=torch.int32, device=base.device)
        self._sent: list[list[int]] = [[] for _ in range(most)]  # what each row of the table has

    def fill(self, spans: Sequence[Span], owners: Sequence[int], size: int) -> None:
        """Takes rows in, and fills up to `size` with rows that read and write the scratch block."""
        scratch, missing = self._scratch_block, size - len(spans)
        rows = [_row(span, owner) for span, owner in zip(spans, owners, strict=True)]
        rows += [(0, 0, scratch * BLOCK_TOKENS, 1, NOBODY, self._scratch_slot)] * missing
        self._numbers[:, :size] = torch.tensor(rows).T.to(self._numbers.device)
        blocks = [span.sequence.blocks[: blocks_for(span.stop)] for span in spans]
        self._send([*blocks, *[[scratch]] * missing])

    def _send(self, blocks: Sequence[list[int]]) -> None:
        """Of the table only what is read and changed is sent: a sequence has a new block once in
        BLOCK_TOKENS passes.
        """
        changed = [i for i, own in enumerate(blocks) if own != self._sent[i]]
        if not changed:
            return
        longest = max(len(blocks[i]) for i in changed)
        filler = [self._scratch_block]
        table = [blocks[i] + filler * (longest - len(blocks[i])) for i in changed]
        device = self.table.device
        rows = torch.tensor(table, dtype=torch.int32).to(device)
        self.table[:, :longest].index_copy_(0, torch.tensor(changed, device=device), rows)
        for i in changed:
            self._sent[i] = blocks[i]


def _row(span: Span, owner: int) -> tuple[int, int, int, int, int, int]:
    sequence, position = span.sequence, span.start
    (token,) = sequence.tokens(position, span.stop)
    slot = sequence.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
    return token, position, slot, span.stop, owner, sequence.state or 0


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
        self._columns = ColumnBank(base.groups, columns, base.device, base.dtype)
        vocabulary_size = base.description.vocabulary_size
        self._logits = torch.zeros(most_rows, vocabulary_size, device=base.device)
        self._most_rows = most_rows
        self.passes: dict[tuple[int, int], Callable[[], None]] = {}  # by rows and columns
        # Of the last pass the experts of its rows, [rows, k] of each layer that has any.
        self.chosen: list[Tensor] = []
        self._chosen: dict[tuple[int, int], list[Tensor]] = {}  # as `passes`
        recorded = base.device.type == "cuda" and not reads_on_host(base)
        self.recorder = Recorder(base.device) if recorded else None  # None: passes are launched

    def run(
        self, spans: Sequence[Span], adapters: Mapping[str, AdapterRow]
    ) -> tuple[Tensor, list[TokenSequence]]:
        """Computes the tokens of spans that decode, at least one. Returns logits [n, V] float32,
        which the next pass overwrites, and whose each row is.
        """
        spans = sorted(spans, key=lambda span: span.sequence.adapter)
        rows = [adapters.get(span.sequence.adapter) for span in spans]
        if begun := [span.sequence.state or 0 for span in spans if not span.start]:
            self._cache.states.clear(torch.tensor(begun, device=self._rows.states.device))
        columns = self._columns.admit([row for row in dict.fromkeys(rows) if row is not None])
        if columns is None:
            logits = self._run_grouped(spans, rows)
        else:
            size = min(1 << (len(spans) - 1).bit_length(), self._most_rows)
            self._rows.fill(spans, [self._columns.owner(row) for row in rows], size)
            self._pass(size, columns)()
            self.chosen = self._chosen.get((size, columns), [])
            logits = self._logits[: len(spans)]
        return logits, [span.sequence for span in spans]

    def _pass(self, size: int, columns: int) -> Callable[[], None]:
        key = (size, columns)
        if key not in self.passes:
            compute = partial(self._compute, size, columns)
            self.passes[key] = self.recorder.record(compute) if self.recorder else compute
        return self.passes[key]

    def _compute(self, size: int, columns: int) -> None:
        """Reads and writes tensors that stay where they are. Nothing is read on the host."""
        active = self._columns.active(self._rows.owners[:size], columns) if columns else None
        with self._base.context.side_by_side(active):
            self._logits[:size] = self._base.head.all_logits(self._hidden(size))
        if self._base.routing:
            self._chosen[size, columns] = self._base.routing.chosen

    def _run_grouped(self, spans: Sequence[Span], rows: Sequence[AdapterRow | None]) -> Tensor:
        """A pass over more adapters than there are columns: an adapter's rows side by side."""
        self._rows.fill(spans, [NOBODY] * len(spans), len(spans))
        segments: list[Segment] = []
        for row, group in itertools.groupby(rows):
            start = segments[-1].stop if segments else 0
            segments.append(Segment(start, start + len(list(group)), row))
        hidden = self._hidden(len(spans), segments)
        self.chosen = self._base.routing.chosen if self._base.routing else []
        places = torch.arange(len(spans), device=hidden.device)
        return self._base.head.logits(hidden, [Piece(s, places[s.rows]) for s in segments])

    def _hidden(self, size: int, segments: Sequence[Segment] = ()) -> Tensor:  # [size, d]
        """The last hidden states of the first rows."""
        rows = self._rows
        attention = PagedAttention(
            self._cache,
            self._attend,
            rows.slots[:size],
            rows.table[:size],
            rows.lengths[:size],
            rows.states[:size],
        )
        tokens, positions = rows.tokens[:size], rows.positions[:size]
        return self._base.hidden(tokens, positions, tuple(segments), attention)


class Recorder:
    """Makes CUDA graphs. They share their memory: of all of them one runs at a time, and what it
    leaves is read before the next one runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Runs once what has no arguments and no result, records it, and returns its replay."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            compute()  # kernels are compiled, and libraries set up, before anything is recorded
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            compute()
        return graph.replay


def reads_on_host(base: LoadedBase) -> bool:
    """Whether a pass reads on the host what it has computed: it cannot be recorded then. Grouped
    products of experts do but for bfloat16.
    """
    grouped = base.routing is not None and base.dtype != torch.bfloat16
    return grouped or reads_lengths(base.text.config)


def reads_lengths(config: Any) -> bool:
    """Whether a model of this configuration reads on the host how long the longest sequence is, as
    rotary embeddings of some kinds do. What it does then cannot be recorded.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    # Either one set of parameters, or one for each kind of layer.
    sets = (rope, *(value for value in rope.values() if isinstance(value, dict)))
    kinds = {str(parameters.get("rope_type")) for parameters in sets}
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def _attention_of(device: torch.device) -> DecodeAttention:
    if device.type != "cuda":
        return plain_attention
    # Here, since Triton is not everywhere.
    from sampler_service.engine.cache.paged_kernels import paged_attention

    return paged_attention
