"""In which order past work is done again, against doing it as it was done."""

from random import Random

import pytest

from trainer_service.journal.records import Effect, PastCall, TileRecord
from trainer_service.recovery.replay_order import Again, Finished, Incomplete, Pass, replay_order

Event = tuple[str, int, int, int]  # what, run, sequence, tile


def past(*effects: Effect, first: int = 1) -> list[PastCall]:
    return [PastCall(first + place, effect, None) for place, effect in enumerate(effects)]


def tile(run: int, sequence: int, index: int = 0) -> TileRecord:
    return TileRecord(run, sequence, index, index, 1)


def events(
    pasts: dict[int, list[PastCall]], plans: dict[int, list[TileRecord]]
) -> dict[int, list[Event]]:
    """What happens to each run, in order."""
    found: dict[int, list[Event]] = {run: [] for run in pasts}
    for item in replay_order(pasts, plans):
        match item:
            case Pass(_, tiles, wanted):
                for each in tiles:
                    if each in wanted:
                        found[each.run].append(("add", each.run, each.sequence, each.tile))
            case Again(run, call):
                found[run].append((call.effect.name.lower(), run, call.sequence, 0))
            case Finished(run):
                found[run].append(("finished", run, 0, 0))
    return found


def test_steps_come_between_the_passes_they_came_between() -> None:
    calls = past(Effect.ADD, Effect.STEP, Effect.ADD, Effect.CLEAR, Effect.ADD, Effect.STEP)
    plans = {1: [tile(1, 1)], 2: [tile(1, 3)], 3: [tile(1, 5)]}

    order = [(what, sequence) for what, _, sequence, _ in events({1: calls}, plans)[1]]

    assert order == [
        ("add", 1),
        ("step", 2),
        ("add", 3),
        ("clear", 4),
        ("add", 5),
        ("step", 6),
        ("finished", 0),
    ]


def test_passes_are_whole_and_those_that_are_not_wanted_are_told_apart() -> None:
    plans = {1: [tile(1, 1), tile(2, 1), tile(3, 1)]}

    (item, *_) = replay_order({1: past(Effect.ADD), 2: past(Effect.CLEAR)}, plans)
    found = list(replay_order({1: past(Effect.ADD), 2: past(Effect.CLEAR)}, plans))
    passes = [each for each in found if isinstance(each, Pass)]

    assert item == Again(2, PastCall(1, Effect.CLEAR, None))
    assert [len(each.tiles) for each in passes] == [3]
    assert passes[0].wanted == {tile(1, 1)}


def test_of_a_call_that_was_begun_twice_only_the_last_time_counts() -> None:
    plans = {
        1: [tile(1, 1, 0), tile(1, 1, 1)],  # an engine died before the third tile
        2: [tile(2, 1)],
        3: [tile(1, 1, 0)],
        4: [tile(1, 1, 1), tile(1, 1, 2)],
    }

    found = [
        (item.plan, sorted(each.tile for each in item.wanted if each.run == 1))
        for item in replay_order({1: past(Effect.ADD), 2: past(Effect.ADD)}, plans)
        if isinstance(item, Pass)
    ]

    assert found == [(2, []), (3, [0]), (4, [1, 2])]


def test_a_run_of_which_a_pass_is_missing_is_left_out_and_named() -> None:
    calls = {1: past(Effect.ADD, Effect.STEP), 2: past(Effect.ADD, Effect.STEP)}

    found = list(replay_order(calls, {5: [tile(2, 1)]}))

    assert found[0] == Incomplete(1, 1)
    assert [item.run for item in found if isinstance(item, Finished)] == [2]


@pytest.mark.parametrize("seed", range(30))
def test_every_run_gets_its_own_history_in_its_order(seed: int) -> None:
    """Random histories of runs that share passes."""
    random = Random(seed)
    histories: dict[int, list[Event]] = {run: [] for run in (1, 2, 3)}
    pasts: dict[int, list[PastCall]] = {run: [] for run in histories}
    plans: dict[int, list[TileRecord]] = {}
    plan = 0
    for _ in range(40):
        run = random.choice([*histories])
        sequence = len(pasts[run]) + 1
        effect = random.choice([Effect.ADD, Effect.ADD, Effect.STEP, Effect.CLEAR])
        pasts[run].append(PastCall(sequence, effect, None))
        if effect is not Effect.ADD:
            histories[run].append((effect.name.lower(), run, sequence, 0))
            # The next tiles of the run come in a later pass, as they did.
            plan += any(each.run == run for each in plans.get(plan, ()))
            continue
        for index in range(random.randint(1, 3)):
            plan += random.random() < 0.4
            plans.setdefault(plan, []).append(tile(run, sequence, index))
            histories[run].append(("add", run, sequence, index))
    wanted = random.sample([*histories], random.randint(1, 3))

    found = events({run: pasts[run] for run in wanted}, plans)

    for run in wanted:
        assert found[run] == [*histories[run], ("finished", run, 0, 0)]
