"""Proves, on two short documents, that the packed path computes what the model's own code does."""

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mint_core.engine_host.pipe import RoutedShape
from mint_core.lora.bank import Part
from mint_core.lora.groups import watching
from mint_core.lora.segments import MIN_ROWS, Segment
from mint_core.lora.spec import AdapterSpec
from mint_core.model import architecture
from mint_core.model.attention import PackedAttention
from mint_core.model.attention_kernels import Scores, causal_attention
from mint_core.model.base import LoadedBase
from mint_core.model.head import Piece
from mint_core.model.mixers.kinds import states_before
from mint_core.model.mixers.mixer import Inputs, Mixer
from mint_core.model.routing import Routing
from mint_core.model.shortcuts import install_shortcuts

logger = logging.getLogger(__name__)

PROBE_TOKENS = 24  # of each of two documents


def _probe(model: nn.Module) -> Tensor:  # [2, tokens]
    device = next(model.parameters()).device
    numbers = torch.arange(2 * PROBE_TOKENS, device=device) * 7919 + 11
    vocabulary_size: int = architecture.text_config(model).vocab_size
    return numbers.view(2, -1) % vocabulary_size


@torch.no_grad()
def own_logits(model: nn.Module) -> Tensor:  # [2 tokens, vocabulary] float32
    """What the model as transformers made it says of both documents."""
    logits: Tensor = model(input_ids=_probe(model), use_cache=False).logits
    return logits.float().flatten(0, 1)


class _Probe(PackedAttention):
    """Notes what window each layer asks for, and what a cache would keep of it."""

    def __init__(self, bounds: list[int]) -> None:
        super().__init__(bounds)
        self.scores: dict[int, Scores] = {}
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, of the whole stream
        self.mixed: dict[int, Inputs] = {}  # of layers with state, of the whole stream
        self.calls: Counter[int] = Counter()  # of each layer's attention, or mixer

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        self.scores[layer_index] = scores
        self.kept[layer_index] = key, value
        self.calls[layer_index] += 1
        return super().attend(layer_index, query, key, value, scores)

    def mix(self, layer_index: int, mixer: Mixer, inputs: Inputs) -> Tensor:
        self.mixed[layer_index] = inputs
        self.calls[layer_index] += 1
        return super().mix(layer_index, mixer, inputs)


class _Decoding:
    """Each row is a token of the first document, beside what was kept of those before it."""

    def __init__(self, probe: _Probe, places: Sequence[int]) -> None:
        self._kept, self._mixed = probe.kept, probe.mixed
        self._places = places

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        outputs = []
        for row, place in enumerate(self._places):
            own = slice(row, row + 1)
            keys, values = (
                torch.cat([kept[:, :place], new[:, own]], dim=1)
                for kept, new in zip(self._kept[layer_index], (key, value), strict=True)
            )
            outputs.append(causal_attention(query[:, own], keys, values, scores))
        return torch.cat(outputs, dim=1)

    def mix(self, layer_index: int, mixer: Mixer, inputs: Inputs) -> Tensor:
        states = states_before(mixer, self._mixed[layer_index], self._places)
        return mixer.step(inputs, states)[0]


@torch.no_grad()
def prove(base: LoadedBase, expected: Tensor) -> None:
    """Refuses a model whose own logits the packed path does not reproduce: the documents side by
    side, and tokens that are decoded from what is kept of the first.
    """
    tokens = _probe(base.model)
    n = tokens.shape[1]
    positions = torch.arange(n, device=base.device)
    whole = Segment(0, 2 * n)
    probe = _Probe([0, n, 2 * n])
    with architecture.refusing(base.model):
        hidden = base.hidden(tokens.flatten(), positions.repeat(2), (whole,), probe)
    architecture.check_layers(base.model, probe.calls)
    architecture.check_windows(base.model, {i: s.sliding_window for i, s in probe.scores.items()})
    every = torch.arange(2 * n, device=base.device)
    _compare(base, "packed", base.head.logits(hidden, [Piece(whole, every)]), expected)
    places = positions[n // MIN_ROWS - 1 :: n // MIN_ROWS]
    rows = Segment(0, len(places))
    decoding = _Decoding(probe, places.tolist())
    with architecture.refusing(base.model):
        hidden = base.hidden(tokens[0, places], places, (rows,), decoding)
    decoded = base.head.logits(hidden, [Piece(rows, every[rows.rows])])
    _compare(base, "decoded", decoded, expected[places])


@torch.no_grad()
def with_routing(base: LoadedBase, routing: Routing) -> LoadedBase:
    """The base with the shape of its routing in its description. Refuses experts that do not go
    through our function, and routers that cannot be told where tokens go.
    """
    tokens = _probe(base.model)[0]
    n = len(tokens)
    places, whole = torch.arange(n, device=base.device), (Segment(0, n),)
    base.hidden(tokens, places, whole, PackedAttention([0, n]))
    architecture.check_experts(base.model, routing)
    told = (torch.stack(routing.chosen, 1) + 1) % routing.experts  # others than its own
    base.hidden(tokens, places, whole, PackedAttention([0, n]), told)
    if not torch.equal(torch.stack(routing.chosen, 1), told):
        raise architecture.unsupported(base.model, "its routers cannot be told where tokens go")
    shape = RoutedShape(len(routing.layers), routing.experts, routing.experts_per_token)
    return replace(base, description=replace(base.description, routed=shape))


def bits_are_its_own(base: LoadedBase, *, backward: bool) -> bool:
    """Whether a document of an odd length gets the same hidden states, and gradient, bit for bit,
    alone and between others: some of torch's kernels round the end of a tensor otherwise than its
    midst, and some of MKL's rows by where they lie in memory.
    """
    tokens = _probe(base.model).flatten()
    n = PROBE_TOKENS // 2 + 1
    spec = AdapterSpec(rank=8, alpha=8.0, use_rslora=False, seed=0, modules=tuple(base.shapes))
    found = []
    for before, after in ((0, 0), (n - 2, PROBE_TOKENS)):
        row = base.new_bank().add(spec)
        row.part(Part.WEIGHTS).normal_(0.0, 0.05, generator=torch.Generator().manual_seed(0))
        own = slice(before, before + n)
        bounds = sorted({0, own.start, own.stop, own.stop + after})
        ends = list(itertools.pairwise(bounds))
        segments = tuple(
            Segment(start, stop, row, accumulate=backward)
            if start == before
            else Segment(start, stop)
            for start, stop in ends
        )
        positions = torch.cat([torch.arange(stop - start) for start, stop in ends])
        stream = tokens.roll(before)[: bounds[-1]]  # the document's own are the same
        with torch.set_grad_enabled(backward):
            attention = PackedAttention(bounds)
            hidden = base.hidden(stream, positions.to(base.device), segments, attention)[own]
            if backward:
                (hidden * hidden.detach()).sum().backward()
        found.append((hidden.detach(), row.part(Part.GRADIENT)))
    return all(torch.equal(alone, beside) for alone, beside in zip(*found, strict=True))


def _compare(base: LoadedBase, kind: str, logits: Tensor, expected: Tensor) -> None:
    difference = (logits - expected).abs().max() / expected.abs().max().clamp(min=1.0)
    if not difference < (1e-4 if base.dtype == torch.float32 else 0.1):
        raise architecture.unsupported(
            base.model, f"{kind} logits differ from its own by {difference.item():.1e}"
        )
    logger.info("%s logits agree with the model's own to %.1e", kind, difference.item())


@torch.no_grad()
def take_shortcuts(base: LoadedBase) -> None:
    """Lets modules compute in direct forms where those give the same: at the context's end, where
    also what depends on the position shows.
    """
    tokens = _probe(base.model)[0]
    n = len(tokens)
    probe = _Probe([0, n])
    positions = torch.arange(n, device=base.device) + base.description.context_length - n
    with watching(base.model) as calls:
        base.hidden(tokens, positions, (Segment(0, n),), probe)
    install_shortcuts(calls, probe.scores)
