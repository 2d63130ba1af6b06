"""In which order past work is done again: the passes as they were, and between them each run's
steps where they belong. Nothing here computes.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainer_service.journal.records import Effect, PastCall, TileRecord


@dataclass(frozen=True, slots=True)
class Pass:
    """A plan of before."""

    plan: int
    tiles: Sequence[TileRecord]  # all that is known of
    wanted: frozenset[TileRecord]  # those that are to be in their runs' gradients


@dataclass(frozen=True, slots=True)
class Again:
    """A step, or the clearing of a gradient, of a run given by number."""

    run: int
    call: PastCall


@dataclass(frozen=True, slots=True)
class Finished:
    """The run is where it was."""

    run: int


@dataclass(frozen=True, slots=True)
class Incomplete:
    """The run cannot be brought where it was: no pass with a call of it is known."""

    run: int
    sequence: int


def replay_order(
    pasts: Mapping[int, Sequence[PastCall]],  # by run: what has changed its row, in order
    plans: Mapping[int, Sequence[TileRecord]],  # by number, in order
) -> Iterator[Pass | Again | Finished | Incomplete]:
    """What to do, one after the other, to bring the runs where they were."""
    starts = _starts(plans)
    between = {
        run: [c for c in calls if c.effect is not Effect.ADD] for run, calls in pasts.items()
    }
    unfinished = dict(pasts)
    for run, calls in pasts.items():
        for call in calls:
            if call.effect is Effect.ADD and (run, call.sequence) not in starts:
                del unfinished[run]
                yield Incomplete(run, call.sequence)
                break
    adding = {
        (run, call.sequence)
        for run, calls in unfinished.items()
        for call in calls
        if call.effect is Effect.ADD
    }
    passes = [_pass(plan, tiles, adding, starts) for plan, tiles in plans.items()]
    last = {tile.run: each.plan for each in passes for tile in each.wanted}
    for run in [run for run in unfinished if run not in last]:
        yield from _finish(run, between[run])
    for each in passes:
        for tile in sorted(each.wanted, key=lambda tile: (tile.run, tile.sequence)):
            waiting = between[tile.run]
            while waiting and waiting[0].sequence < tile.sequence:
                yield Again(tile.run, waiting.pop(0))
        if each.wanted:
            yield each
        for run in [run for run, plan in last.items() if plan == each.plan]:
            yield from _finish(run, between[run])


def _finish(run: int, rest: Sequence[PastCall]) -> Iterator[Again | Finished]:
    for call in rest:
        yield Again(run, call)
    yield Finished(run)


def _pass(
    plan: int,
    tiles: Sequence[TileRecord],
    adding: Collection[tuple[int, int]],
    starts: Mapping[tuple[int, int], int],
) -> Pass:
    wanted = [
        tile
        for tile in tiles
        if (call := (tile.run, tile.sequence)) in adding and plan >= starts[call]
    ]
    return Pass(plan, tiles, frozenset(wanted))


def _starts(plans: Mapping[int, Sequence[TileRecord]]) -> dict[tuple[int, int], int]:
    """By call, the plan with which the attempt began that counts. An engine that died half way
    through a call has left tiles of it in earlier plans.
    """
    return {
        (tile.run, tile.sequence): plan
        for plan, tiles in plans.items()
        for tile in tiles
        if tile.tile == 0
    }
