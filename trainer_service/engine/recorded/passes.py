"""Recorded passes: a plan's data goes into tensors that stay where they are, one launch computes
the pass, and gradients are in the rows.

Tenants, ranks, documents and losses are data. What a pass is filled up with belongs to no adapter
and has no loss, so a run's numbers are those of its own rows.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mint_core.lora.bank import AdapterRow
from mint_core.lora.segment_tables import Tables, Told
from mint_core.model.attention import PackedAttention
from mint_core.model.attention_kernels import Scores, varlen_attention, varlen_fits
from mint_core.model.loading import LoadedBase
from mint_core.model.mixers.mixer import Inputs as MixerInputs
from mint_core.model.mixers.mixer import Mixer
from mint_core.model.recordings import (
    Inputs,
    NotRecordable,
    NotRecorded,
    Recorder,
    Recordings,
    reads_lengths,
)
from trainer_service.engine.packing import PackedPlan, pack
from trainer_service.engine.recorded.losses import NUMBERS, LossTable, take
from trainer_service.engine.recorded.shapes import TOKENS, Reason, Shape, shape_of
from trainer_service.engine.training_pass import tile_result
from trainer_service.jobs import Tile, TileResult

logger = logging.getLogger(__name__)

MOST_GRAPHS = 32
RECORDED = "recorded"  # beside the reasons of `Reason`
_HOST = torch.device("cpu")


class RecordedPasses:
    """Of one engine."""

    def __init__(self, base: LoadedBase, most_tokens: int, recorder: Recorder | None) -> None:
        self._base = base
        self._most_tokens = most_tokens
        self._recordings = Recordings(recorder, MOST_GRAPHS)
        self._passes: dict[Shape, StaticPass] = {}
        self._never: Reason | None = None  # why no pass can be recorded
        self.counts: Counter[str] = Counter()  # of passes, by how they were computed
        if base.routing is not None:
            self._never = Reason.EXPERTS
        elif base.mixers or base.head.softcap is not None or reads_lengths(base.text.config):
            self._never = Reason.MODEL
        logger.info("passes of up to %d tokens are recorded", 0 if self._never else most_tokens)

    def run(
        self, tiles: Sequence[Tile], rows: Mapping[str, AdapterRow]
    ) -> tuple[TileResult, ...] | None:
        """A plan's results, in its order; None if it has to be launched kernel by kernel."""
        shape = self._never or shape_of(tiles, rows, self._most_tokens)
        if isinstance(shape, Shape):
            results = self._run(shape, tiles, rows)
            if results is not None:
                self.counts[RECORDED] += 1
                return results
            shape = self._never or Reason.MEMORY
        self.counts[str(shape)] += 1  # the front knows no more of reasons than their names
        return None

    def _run(
        self, shape: Shape, tiles: Sequence[Tile], rows: Mapping[str, AdapterRow]
    ) -> tuple[TileResult, ...] | None:
        own = self._passes.get(shape) or StaticPass(self._base, shape)
        plan = pack(tiles, rows, _HOST)
        own.take(plan)
        self._base.recomputation.on = False
        try:
            self._recordings.run(shape, own.compute)
        except NotRecordable as problem:
            logger.info("small passes are not recorded: %s", problem)
            self._never = Reason.MODEL
            return None
        except NotRecorded as problem:
            logger.warning("a pass of %d tokens is not recorded: %s", shape.tokens, problem)
            self._most_tokens = max((size for size in TOKENS if size < shape.tokens), default=0)
            self._never = None if self._most_tokens else Reason.MEMORY
            self._recordings.passes.clear()  # memory is given back when no graph is left
            return None
        self._passes[shape] = own
        kept = self._recordings.passes
        self._passes = {known: static for known, static in self._passes.items() if known in kept}
        return own.results(plan)


class StaticPass:
    """A pass of one shape."""

    def __init__(self, base: LoadedBase, shape: Shape) -> None:
        self._base, self._shape = base, shape
        tokens, long, single = shape.tokens, torch.int64, torch.float32
        self._inputs = Inputs(
            {
                "tokens": (long, (tokens,)),
                "positions": (long, (tokens,)),
                "targets": (long, (tokens,)),
                "kinds": (long, (tokens,)),
                "owners": (long, (tokens,)),
                "bounds": (torch.int32, (shape.documents + 1,)),
                "adapters": (long, (shape.tiles + 1, 5)),
                "tiles": (long, (shape.row_tiles, 4)),
                "scales": (single, (shape.tiles + 1,)),
                "numbers": (single, (NUMBERS, tokens)),
            },
            base.device,
        )
        given = self._inputs.device
        self._tables = Tables(given["adapters"], given["tiles"], given["scales"], shape.rank)
        self._outputs = torch.zeros(2, tokens, device=base.device)  # logprobs and losses
        self._plan: PackedPlan | None = None

    def take(self, plan: PackedPlan) -> None:
        """Brings a plan's data to the device."""
        self._plan = plan
        self._inputs.clear()
        host, used, tokens = self._inputs.host, plan.bounds[-1], self._shape.tokens
        bounds = plan.bounds + [tokens] * (self._shape.documents + 1 - len(plan.bounds))
        host["bounds"][:] = bounds
        host["owners"][:] = np.repeat(np.arange(self._shape.documents), np.diff(bounds))
        host["tokens"][:used] = plan.tokens.numpy()
        host["positions"][:used] = plan.positions.numpy()
        host["positions"][used:] = np.arange(tokens - used)
        for tile in plan.tiles:
            start = tile.segment.start
            host["targets"][start : start + len(tile.targets)] = tile.targets.numpy()
            take(tile, host["kinds"], host["numbers"])
        # The tables of adapters; behind those of the plan comes one that is nobody's.
        told = Told([tile.segment for tile in plan.tiles])
        nobody = len(told.adapters)
        host["adapters"][:nobody] = told.adapters
        host["scales"][:nobody] = told.scales
        host["tiles"][:, 0] = nobody
        host["tiles"][: len(told.tiles)] = told.tiles
        self._inputs.send()

    def compute(self) -> None:
        """The pass. On a GPU everything that differs between plans is read from tensors."""
        plan, given, backward = self._plan, self._inputs.device, self._shape.backward
        assert plan is not None
        segments = tuple(tile.segment for tile in plan.tiles)
        attention = StaticAttention(plan.bounds, given["bounds"], self._shape.tokens)
        losses = LossTable(*(given[name] for name in ("kinds", "numbers", "owners", "bounds")))
        with torch.set_grad_enabled(backward):
            hidden = self._base.hidden(
                given["tokens"], given["positions"], segments, attention, recorded=self._tables
            )
            logprobs = self._base.head.target_logprobs(hidden, given["targets"])
        each, slopes = losses.differentiate(logprobs.detach())
        self._outputs[0], self._outputs[1] = logprobs.detach(), each
        if backward:
            logprobs.backward(slopes)

    def results(self, plan: PackedPlan) -> tuple[TileResult, ...]:
        """Of the plan that was computed last. Waits for it, and lets its rows go."""
        outputs = self._outputs.cpu().numpy()
        self._plan = None
        results = []
        for tile in plan.tiles:
            logprobs, losses = outputs[:, tile.segment.rows][:, tile.scored.numpy()]
            results.append(tile_result(tile, logprobs, float(losses.sum(dtype=np.float64))))
        return tuple(results)


class StaticAttention:
    """Of documents whose bounds are a tensor on the device. Elsewhere they are read on the host."""

    def __init__(self, documents: list[int], bounds: Tensor, tokens: int) -> None:
        self._bounds, self._tokens = bounds, tokens
        self._packed = PackedAttention(
            [*documents, tokens] if documents[-1] < tokens else documents
        )

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        if scores.softcap is not None:
            raise NotRecordable("its attention has capped scores")
        if query.device.type == "cpu":
            return self._packed.attend(layer_index, query, key, value, scores)
        if not varlen_fits(query, key, value, scores):
            raise NotRecordable("no kernel takes all documents of a pass at once")
        return varlen_attention(query, key, value, self._bounds, self._tokens, scores)

    def mix(self, layer_index: int, mixer: Mixer, inputs: MixerInputs) -> Tensor:
        raise NotRecordable("it has layers with state")
