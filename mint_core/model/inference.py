"""What makes a base model fit for decoding: weights packed for few rows, and the proof that a row's
bits do not depend on how many rows a pass has; on a GPU, where that is asked for, kernels of which
it is true.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mint_core.errors import FailedPrecondition
from mint_core.lora.bank import AdapterRow, Part
from mint_core.lora.lanes import Lanes
from mint_core.lora.layers import LinearGroup
from mint_core.lora.products.huge_pages import move_later
from mint_core.lora.products.packed import Packing, available
from mint_core.lora.segments import MIN_ROWS, Segment
from mint_core.lora.spec import AdapterSpec
from mint_core.model.attention import PackedAttention
from mint_core.model.base import LoadedBase
from mint_core.model.head import Piece
from mint_core.model.mixers.mixer import Inputs, Mixer, no_states
from mint_core.model.reproducible import ToldTails
from mint_core.model.shortcuts import Layer, RmsNorm

logger = logging.getLogger(__name__)

OWNERS = (0, 0, 0, 1, 1, 1, 1, None, None)  # adapters of the rows of a pass
# Of those rows, passes that must give what one of all gives.
TRIED = (range(1), range(1, 3), range(3, 4), range(2, 5), range(4, 9), range(8, 9))


@torch.no_grad()
def pack(base: LoadedBase, groups: Sequence[LinearGroup], *, exact: bool = True) -> int:
    """Packs the weights of those shapes of which oneDNN computes every row alike (of all, unless
    bits are to be `exact`), and gives the unpacked ones back. Returns how many rows a rowwise
    segment needs for bits of its own.
    """
    if not available(base.device, base.dtype):
        if base.device.type == "cpu":
            logger.info(
                "weights are not packed: oneDNN has no %s for this CPU; decoding takes longer, and "
                "nothing need be done",
                base.description.dtype,
            )
        return MIN_ROWS
    packing = Packing(exact=exact)
    for group in groups:
        for packed in packing.layers([group.weight], group.bias):
            group.pack(packed)
    if base.routing is not None:
        base.routing.pack(packing)
    move_later([layer.addresses for layer in packing.packed], packing.packed)
    logger.info("weights packed: %s", packing)
    base.context.lanes = Lanes(base.dtype)
    least = MIN_ROWS if exact and not _rows_are_alike(base) else 1
    base.context.lanes = Lanes(base.dtype)  # without what was tried
    if least > 1:
        logger.info(
            "this CPU's libraries round a row by its neighbours, so an adapter's part of a pass is "
            "filled up to %d rows: fewer sequences take as long as so many, more lose nothing, and "
            "nothing need be done; --trade-bits-for-speed fills up none",
            least,
        )
    return least


def _rows_are_alike(base: LoadedBase) -> bool:
    """Whether passes of few rows give, bit for bit, what one of many does, with two adapters and
    the head.
    """
    bank = base.new_bank()
    spec = AdapterSpec(rank=8, alpha=8.0, use_rslora=False, seed=0, modules=tuple(base.shapes))
    rows = [bank.add(spec), bank.add(spec)]
    generator = torch.Generator().manual_seed(0)
    for row in rows:
        row.part(Part.WEIGHTS).normal_(0.0, 0.05, generator=generator)
    with ToldTails():
        whole = _run(base, rows, range(len(OWNERS)))
        return all(torch.equal(_run(base, rows, part), whole[part]) for part in TRIED)


class _EachAlone(PackedAttention):
    """Of documents of one token, computed as those that decode are."""

    def mix(self, layer_index: int, mixer: Mixer, inputs: Inputs) -> Tensor:
        rows = len(inputs[0])
        return mixer.step(inputs, no_states(mixer, rows, inputs[0].device))[0]


def _run(base: LoadedBase, rows: Sequence[AdapterRow], part: range) -> Tensor:  # [part, V]
    """Logits of some of the sequences of one token, each with its adapter."""
    segments: list[Segment] = []
    for owner, own in itertools.groupby(OWNERS[part.start : part.stop]):
        start = segments[-1].stop if segments else 0
        row = None if owner is None else rows[owner]
        segments.append(Segment(start, start + len(list(own)), row, rowwise=True))
    numbers = torch.arange(part.start, part.stop)
    tokens = numbers * 7919 % base.description.vocabulary_size
    each_alone = _EachAlone(list(range(len(part) + 1)))
    hidden = base.hidden(tokens, numbers, tuple(segments), each_alone)
    places = torch.arange(len(part))
    return base.head.logits(hidden, [Piece(s, places[s.rows]) for s in segments])


def make_row_wise(base: LoadedBase) -> None:
    """From now on computes by kernels in which a row's bits depend on that row alone, without
    backward, as linear layers do already by `LoraContext.row_wise`; attention is the pass's own.
    Raises FailedPrecondition over a model that has parts of which that is not known.
    """
    if what := _foreign(base):
        raise FailedPrecondition(
            f"`batch_invariant` is not for this model on a GPU: {what}; leave it out, or give "
            "`device` cpu"
        )
    for module in base.model.modules():
        if isinstance(module.forward, RmsNorm):
            module.forward.row_wise = True
    base.head.make_row_wise()


def _foreign(base: LoadedBase) -> str | None:
    """What may compute a row otherwise beside others."""
    if base.routing is not None:
        return "its experts take the rows of all sequences together"
    if base.mixers:
        return "it has layers with state, whose chunks are cut by what else there is"
    name = next((name for name, module in _parts(base.text) if not _known(module)), None)
    return None if name is None else f"its `{name}` is computed by the model's own code"


def _parts(module: nn.Module, before: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from _parts(child, f"{before}{name}.")
        else:
            yield before + name, child


def _known(module: nn.Module) -> bool:
    form = module.forward
    if isinstance(form, Layer):
        return form.is_whole
    # Looking rows up changes none, and what has no weights takes number by number.
    plain = isinstance(module, nn.Embedding) or not any(True for _ in module.parameters())
    return plain or isinstance(form, RmsNorm)
