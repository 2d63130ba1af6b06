"""Is what became of a run beside the scripts what may become of one? Knows nothing of the server:
standard library only. The scripts' own runs are for `checker`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

ANSWERED = "ANSWERED"
NOT_FOUND = "TRAINING_RUN_NOT_FOUND"
LOST = "TRAINING_RUN_LOST"
DAMAGED = "REQUEST_DAMAGED"


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A run of the same tenant to which nothing was done."""

    run: str
    wanted_step: int
    steps: tuple[int, ...]  # as it is listed
    saved: str  # what a question for its checkpoint was told


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    """A run whose deletion was acknowledged: what was told, and what is left of it."""

    run: str
    named: bool  # checkpoints were to go too
    calls: tuple[str, ...]  # that were under way: what they came to, in their order
    opened: str
    deleted_again: str
    listed: bool
    tables: tuple[str, ...]
    files: tuple[str, ...]
    checkpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A run whose record was damaged: what was told."""

    run: str
    executed: bool  # whether the call whose request it was had been executed
    calls: tuple[str, ...]  # that were under way
    reason: str  # for which it is refused
    named: str  # the run that the refusal names
    message: str  # of its state


def problems_of_deletion(found: Deleted, neighbour: Neighbour) -> Iterator[str]:
    """What is wrong with a deletion under load."""
    name = f"deleted run {found.run}"
    yield from _calls(name, found.calls, NOT_FOUND)
    if found.opened != NOT_FOUND:
        yield f"{name}: to open it was told {found.opened}"
    if found.deleted_again != NOT_FOUND:
        yield f"{name}: to delete it again was told {found.deleted_again}"
    if found.listed:
        yield f"{name}: is listed"
    for what, left in (("tables", found.tables), ("files", found.files)):
        if left:
            yield f"{name}: has left {what} {', '.join(left)}"
    wanted = () if found.named else (f"mint://{found.run}/weights/kept",)
    if found.checkpoints != wanted:
        yield f"{name}: has checkpoints {found.checkpoints}, not {wanted}"
    yield from _neighbour(neighbour)


def problems_of_loss(found: Lost, neighbour: Neighbour) -> Iterator[str]:
    """What is wrong with what became of a damaged record: a call that was not executed yet is
    refused, and no more; of one that was executed the run is lost.
    """
    name = f"damaged run {found.run}"
    if not found.executed:
        yield from _calls(name, found.calls, DAMAGED)
        if found.calls.count(DAMAGED) != 1 or found.reason != ANSWERED or found.message:
            yield f"{name}: is told {found.reason}, and of itself says {found.message or 'nothing'}"
        yield from _neighbour(neighbour)
        return
    yield from _calls(name, found.calls, LOST)
    if (found.reason, found.named) != (LOST, found.run):
        yield f"{name}: is told {found.reason} of {found.named or 'nobody'}"
    if not found.message.startswith("weights lost"):
        yield f"{name}: says of itself: {found.message or 'nothing'}"
    yield from _neighbour(neighbour)


def _calls(name: str, calls: tuple[str, ...], reason: str) -> Iterator[str]:
    """Each was answered or refused for that reason."""
    for place, told in enumerate(calls, start=1):
        if told not in (ANSWERED, reason):
            yield f"{name}: call {place} was told {told}"


def _neighbour(found: Neighbour) -> Iterator[str]:
    if found.steps != (found.wanted_step,):
        yield f"neighbour {found.run}: is at steps {found.steps}, not at {found.wanted_step}"
    if found.saved != ANSWERED:
        yield f"neighbour {found.run}: its checkpoint is told {found.saved}"
