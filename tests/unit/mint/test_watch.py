"""Watching a run through faults of the transport."""

import asyncio
import threading
from typing import Any

import pytest

import mint
from mint import types
from mintrpc.v1 import trainer_pb2, types_pb2
from tests.unit.mint.faulty_server import RUN, Code, Fault, Server

LIMIT_S = 20.0
STAYS = 99  # waiting calls, says a stream that stays open

Event = trainer_pb2.WatchTrainingRunResponse


def state(step: int) -> Event:
    run = trainer_pb2.TrainingRun(
        training_run_id=RUN,
        step=step,
        state=trainer_pb2.TrainingRun.STATE_ACTIVE,
        lora_config=types_pb2.LoraConfig(rank=16),
    )
    return Event(training_run=run)


def outcome(sequence: int, **fields: Any) -> Event:
    return Event(call_outcome=trainer_pb2.CallOutcome(sequence=sequence, **fields))


def test_events_are_plain_values(server: Server, training: mint.TrainingClient) -> None:
    metrics = {"loss:sum": 1.5}
    ended = outcome(7, method="OptimStep", step=3, code=3, metrics=metrics, missed_outcomes=2)
    ended.event_time.FromJsonString("2026-11-24T01:02:03Z")
    waits = Event(queue_progress={"waiting_calls": 2, "tokens_ahead": 800})
    timed = Event(queue_progress={"estimated_wait": {"seconds": 1, "nanos": 500_000_000}})
    unknown = Event()
    server.script.watches = [([state(2), waits, timed, unknown, ended], None)]

    events = list(training.watch())

    assert [event.training_run and event.training_run.step for event in events[:1]] == [2]
    assert [event.queue_progress for event in events[1:3]] == [
        types.QueueProgress(2, 800, None),
        types.QueueProgress(0, 0, 1.5),
    ]
    assert events[3].event_time.isoformat() == "2026-11-24T01:02:03+00:00"
    assert events[3].call_outcome == types.CallOutcome(
        sequence=7,
        method="OptimStep",
        step=3,
        code="INVALID_ARGUMENT",
        metrics=metrics,
        missed_outcomes=2,
    )
    assert events[3].training_run is None
    assert len(events) == 4


@pytest.mark.parametrize(
    "fault",
    [
        Fault(Code.UNAVAILABLE),
        Fault(Code.UNAVAILABLE, "UNAVAILABLE"),
        Fault(Code.INTERNAL, message="Received RST_STREAM with error code 2"),
        Fault(Code.DEADLINE_EXCEEDED),
    ],
)
def test_a_broken_stream_is_opened_again(
    server: Server, training: mint.TrainingClient, fault: Fault
) -> None:
    server.script.watches = [
        ([state(1), outcome(1)], fault),
        ([], fault),
        ([state(5), outcome(9)], None),
    ]

    events = list(training.watch())

    assert [event.training_run.step for event in events if event.training_run] == [1, 5]
    assert [event.call_outcome.sequence for event in events if event.call_outcome] == [1, 9]
    assert server.script.watched == 3


def test_a_broken_watch_goes_on_where_the_server_lists_that(server: Server) -> None:
    """And from now on where what came meanwhile is gone."""
    broken, gone = Fault(Code.UNAVAILABLE), Fault(Code.FAILED_PRECONDITION, "EVENTS_GONE")
    first, second, third, fourth = state(1), outcome(1), outcome(2), state(5)
    for number, event in enumerate((first, second, third, fourth), 4):
        event.event_number = number
    for features, expected in ((["resume_watch"], [0, 5, 6, 0]), ([], [0, 0, 0])):
        server.model.features, server.script.resumed = features, []
        server.script.watches = [([first, second], broken), ([third], broken)]
        server.script.watches += [([], gone)] if features else []
        server.script.watches += [([fourth], None)]
        with mint.ServiceClient(base_url=server.address) as client:
            events = list(client.watch_training_run(RUN))
        assert server.script.resumed == expected
        assert [event.training_run.step for event in events if event.training_run] == [1, 5]
        assert [event.call_outcome.sequence for event in events if event.call_outcome] == [1, 2]


def test_a_run_that_is_gone_is_an_error_and_the_end(
    server: Server, training: mint.TrainingClient
) -> None:
    server.script.watches = [([state(1)], Fault(Code.NOT_FOUND, "TRAINING_RUN_NOT_FOUND"))]
    watch = training.watch()

    assert next(watch).training_run
    with pytest.raises(mint.NotFoundError):
        next(watch)
    assert list(watch) == []


def test_a_server_that_stays_away_is_an_error(server: Server) -> None:
    server.script.watches = [([state(1)], Fault(Code.UNAVAILABLE))] + [
        ([], Fault(Code.UNAVAILABLE))
    ] * 50
    with mint.ServiceClient(base_url=server.address, timeout=0.5) as service:
        watch = service.watch_training_run(RUN)
        assert next(watch).training_run
        with pytest.raises(mint.APIConnectionError, match="no server answered"):
            next(watch)


def test_closing_ends_a_wait_and_leaves_the_server(
    server: Server, training: mint.TrainingClient
) -> None:
    with training.watch() as watch:
        assert next(watch).queue_progress == types.QueueProgress(STAYS, 0, None)
        threading.Timer(0.05, watch.close).start()
        assert list(watch) == []
    assert server.script.watch_left.wait(LIMIT_S)


def test_a_loop_that_is_left_leaves_the_server(
    server: Server, training: mint.TrainingClient
) -> None:
    for _ in training.watch():
        break
    assert server.script.watch_left.wait(LIMIT_S)


def test_a_closed_client_ends_its_watches(server: Server) -> None:
    service = mint.ServiceClient(base_url=server.address)
    watch = service.watch_training_run(RUN)
    next(watch)
    service.close()
    with pytest.raises(mint.APIConnectionError, match="has been closed"):
        next(watch)
    with pytest.raises(mint.APIConnectionError, match="has been closed"):
        service.watch_training_run(RUN)


async def test_it_can_be_awaited_and_a_wait_given_up_loses_nothing(
    server: Server, training: mint.TrainingClient
) -> None:
    server.script.watches = [([outcome(1)], Fault(Code.UNAVAILABLE)), ([outcome(2)], None)]
    with training.watch() as watch:
        first = await anext(watch)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(watch), 0.0)
        rest = [event async for event in watch]

    sequences = [event.call_outcome and event.call_outcome.sequence for event in [first, *rest]]
    assert sequences == [1, 2]
