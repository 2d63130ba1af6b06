"""Calls made by hand."""

import hashlib
from typing import Any

import numpy as np

from trainer_service.calls import Call, Compute, Discard, Method, Place, Work
from trainer_service.jobs import AdamParams, CrossEntropy, Document, StepRow, Tile
from trainer_service.queue.planner import cut


def document(tokens: int, first: int = 0) -> Document:
    ids = np.arange(first, first + tokens)
    return Document(tokens=ids, targets=ids + 1, weights=np.ones(tokens, np.float32))


def wide_document(tokens: int, k: int) -> Document:
    """With k targets at each position."""
    shape = (tokens, k)
    ids = np.arange(tokens)
    return Document(tokens=ids, targets=np.zeros(shape, int), weights=np.ones(shape, np.float32))


def of(*documents: Document, backward: bool = True) -> Compute:
    return Compute(documents=documents, loss=CrossEntropy(), backward=backward, weighted_only=False)


def call(
    sequence: int,
    *,
    run: str = "run-a",
    payload: str = "",
    epoch: int = 1,
    acknowledged: int = 0,
    method: Method = "ForwardBackward",
    work: Work | None = None,
) -> Call:
    place = Place(
        training_run_id=run,
        sequence=sequence,
        writer_epoch=epoch,
        acknowledged_sequence=acknowledged,
        payload_hash=hashlib.sha256(payload.encode()).digest(),
    )
    return Call(place, method, work or Discard())


def compute(*lengths: int, backward: bool = True) -> Compute:
    return of(*(document(length) for length in lengths), backward=backward)


def tiles(run: str, sequence: int, *lengths: int, tile_tokens: int = 16) -> tuple[Tile, ...]:
    """Of a backward of documents of these lengths."""
    return cut(compute(*lengths), tile_tokens, training_run_id=run, sequence=sequence)


def step(run: str, **params: Any) -> StepRow:
    return StepRow(run, AdamParams(**params))
