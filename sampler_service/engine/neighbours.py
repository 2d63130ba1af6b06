"""Tries, before anything is served, whether sequences get the same bits alone and beside others."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mint_core.errors import FailedPrecondition
from mint_core.lora.bank import AdapterRow, Part
from mint_core.lora.spec import AdapterSpec
from mint_core.model.loading import LoadedBase
from sampler_service.engine.cache.blocks import blocks_for
from sampler_service.engine.decoder import Decoder
from sampler_service.engine.drawing.randomness import Draw
from sampler_service.engine.drawing.token_draws import draw_tokens
from sampler_service.engine.row_passes import RowPasses
from sampler_service.engine.sequences import Span, TokenSequence
from sampler_service.jobs import Choice

PROMPTS = (("", 5), ("narrow", 21), ("wide", 2))  # adapters, and tokens; the last is decoded
RANKS = {"narrow": 8, "wide": 40}  # of adapters; one has more than a tile of columns
BESIDE = 70  # rows of a pass beside which one is tried: more than a block of products has
_CHOICES = (Choice(seed=1, temperature=0.7), Choice(seed=2, top_k=9, top_p=0.9), Choice(seed=3))


@torch.inference_mode()
def prove(base: LoadedBase, decoder: Decoder) -> None:
    """Refuses a device on which they do not. The cache must be nobody's yet."""
    assert decoder.row_passes is not None
    adapters = _adapters(base)
    alone = []
    for sequence in _sequences(base, 0):
        hidden = _prompts(decoder.row_passes, [sequence], adapters)
        alone += [*hidden, *_told(decoder, [sequence], adapters)[0]]
    # Others' rows come first, and of one prompt a piece beside what decodes.
    others = _sequences(base, sum(blocks_for(length) for _, length in PROMPTS))
    prompts = _prompts(decoder.row_passes, others[::-1], adapters)[::-1]
    piece = Span(others[1], 0, len(others[1]) - 1, decodes=False)
    rows = min(BESIDE, decoder.most_rows - piece.stop)
    decoding = [others[-place % len(others)] for place in range(rows)]
    told = _told(decoder, decoding, adapters, [piece])
    decoder.forget_adapters()
    beside = []
    for sequence, hidden_states in zip(others, prompts, strict=True):
        row = max(row for row, own in enumerate(decoding) if own is sequence)
        beside += [hidden_states, *told[row]]
    if not all(torch.equal(*pair) for pair in zip(alone, beside, strict=True)):
        raise FailedPrecondition(
            "`batch_invariant` is not kept on this device: a sequence got other bits beside others "
            "than alone, with this release of torch and Triton; leave it out, or give `device` cpu"
        )


def _adapters(base: LoadedBase) -> dict[str, AdapterRow]:
    bank, modules = base.new_bank(), tuple(base.shapes)
    generator = torch.Generator(base.device).manual_seed(0)
    rows = {}
    for name, rank in RANKS.items():
        spec = AdapterSpec(rank=rank, alpha=rank, use_rslora=False, seed=0, modules=modules)
        rows[name] = bank.add(spec)
        rows[name].part(Part.WEIGHTS).normal_(0.0, 0.05, generator=generator)
    return rows


def _sequences(base: LoadedBase, first_block: int) -> list[TokenSequence]:
    sequences = []
    for number, (adapter, length) in enumerate(PROMPTS):
        tokens = [
            (7919 * at + 11 + number) % base.description.vocabulary_size for at in range(length)
        ]
        sequence = TokenSequence(number, 0, adapter, tokens)
        stop = first_block + blocks_for(length)
        sequence.blocks, first_block = list(range(first_block, stop)), stop
        sequences.append(sequence)
    return sequences


def _prompts(
    passes: RowPasses, sequences: Sequence[TokenSequence], adapters: Mapping[str, AdapterRow]
) -> list[Tensor]:
    """Hidden states of all but the last token of each, computed together."""
    spans = [Span(sequence, 0, len(sequence) - 1, decodes=False) for sequence in sequences]
    hidden = passes.hidden(spans, adapters, lambda: None)
    return list(hidden.split([span.stop for span in spans]))


def _told(
    decoder: Decoder,
    sequences: Sequence[TokenSequence],
    adapters: Mapping[str, AdapterRow],
    pieces: Sequence[Span] = (),
) -> list[list[Tensor]]:
    """Of each the logits of its next token, and what is drawn by each of the choices."""
    spans = [Span(own, len(own) - 1, len(own), decodes=True) for own in sequences]
    logits, whose = decoder.run([*spans, *pieces], adapters)
    columns: list[Tensor] = [logits.clone()]
    for choice in _CHOICES:
        draws = [Draw(choice, own.request_id, 0, topk=5) for own in whose]
        drawn = draw_tokens(logits, draws, decoder.sums)
        parts = drawn.tokens, drawn.logprobs, drawn.top_ids, drawn.top_logprobs
        columns += map(torch.from_numpy, parts)
    rows = [whose.index(own) for own in sequences]
    return [[column[row] for column in columns] for row in rows]
