"""A run is watched over real connections."""

import asyncio
import itertools
import uuid
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

import mint
from mint import types
from mintrpc.v1 import trainer_pb2, trainer_pb2_grpc
from tests.integration.conftest import KeyedTrainer
from tests.servers import RunningService
from tests.trainer_rpc import CALL_LIMIT_S, RawRun, create, refusal

Stub = trainer_pb2_grpc.TrainerServiceStub
Request = trainer_pb2.WatchTrainingRunRequest
DATUM = types.Datum(
    types.ModelInput.from_ints([5, 6, 7]), {"target_tokens": [6, 7, 8], "weights": [0, 1, 1]}
)


@pytest.fixture
def client(trainer: RunningService) -> Iterator[mint.ServiceClient]:
    with mint.ServiceClient(base_url=trainer.address) as client:
        yield client


def until_outcome(watch: mint.RunWatch, sequence: int) -> list[types.CallOutcome]:
    """The outcomes up to that of a number."""
    outcomes: list[types.CallOutcome] = []
    for event in watch:
        if event.call_outcome:
            outcomes.append(event.call_outcome)
            if event.call_outcome.sequence == sequence:
                return outcomes
    raise AssertionError("the watch ended")


def test_a_loop_is_watched_by_several(client: mint.ServiceClient) -> None:
    run = client.create_lora_training_client(rank=4)
    watches = [run.watch(), client.watch_training_run(run.training_run_id)]
    for watch in watches:
        first = next(watch).training_run
        assert first
        assert (first.training_run_id, first.state) == (run.training_run_id, "active")
        assert next(watch).queue_progress == types.QueueProgress(0, 0, 0.0)

    losses, norms = [], []
    for _ in range(3):
        losses.append(run.forward_backward([DATUM]).result().metrics["loss:sum"])
        norms.append(run.optim_step(types.AdamParams()).result().metrics["grad_norm:mean"])
    with pytest.raises(mint.BadRequestError):
        run.optim_step(types.AdamParams()).result()

    for watch in watches:
        with watch:
            outcomes = until_outcome(watch, 7)
        assert [outcome.sequence for outcome in outcomes] == [1, 2, 3, 4, 5, 6, 7]
        assert [outcome.metrics["loss:sum"] for outcome in outcomes[0:6:2]] == losses
        assert [outcome.metrics["grad_norm:mean"] for outcome in outcomes[1:6:2]] == norms
        assert [outcome.step for outcome in outcomes] == [0, 1, 1, 2, 2, 3, 3]
        assert [outcome.code for outcome in outcomes[-2:]] == ["OK", "FAILED_PRECONDITION"]
        assert not any(outcome.missed_outcomes for outcome in outcomes)


def test_a_watch_ends_when_the_run_is_deleted(client: mint.ServiceClient) -> None:
    run = client.create_lora_training_client(rank=4)
    watch = run.watch()
    next(watch)

    client.delete_training_run(run.training_run_id)

    list(watch)  # ends, without an error
    with pytest.raises(mint.NotFoundError):
        next(client.watch_training_run(run.training_run_id))


def test_a_change_of_metadata_is_told(client: mint.ServiceClient) -> None:
    run = client.create_lora_training_client(rank=4)
    with run.watch() as watch:
        next(watch)
        client.update_training_run(run.training_run_id, {"a": "b"})
        seen = next(event.training_run for event in watch if event.training_run)
    assert seen.metadata == {"a": "b"}


def test_another_tenants_run_cannot_be_watched(keyed_trainer: KeyedTrainer) -> None:
    run = create(keyed_trainer.stub, keyed_trainer.options("ann"))

    def watch(tenant: str) -> Any:
        return keyed_trainer.stub.WatchTrainingRun(
            Request(training_run_id=run.id), timeout=CALL_LIMIT_S, **keyed_trainer.options(tenant)
        )

    anns = watch("ann")
    assert next(anns).training_run.training_run_id == run.id
    with pytest.raises(grpc.RpcError) as caught:
        next(watch("bob"))
    assert refusal(caught.value).code == grpc.StatusCode.NOT_FOUND

    request = trainer_pb2.DeleteTrainingRunRequest(
        training_run_id=run.id, request_id=uuid.uuid4().hex
    )
    keyed_trainer.stub.DeleteTrainingRun(request, **keyed_trainer.options("ann"))
    assert all(event.HasField("queue_progress") for event in anns)  # and then it ends with OK
    assert anns.code() == grpc.StatusCode.OK


def test_a_reader_that_does_not_read_is_told_how_much_it_missed(
    trainer: RunningService, run: RawRun
) -> None:
    """The stream is kept narrow, so that the server soon cannot write."""
    narrow = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(trainer.address, narrow) as channel:
        stream = Stub(channel).WatchTrainingRun(
            Request(training_run_id=run.id), timeout=CALL_LIMIT_S
        )
        next(stream)
        last = 1000
        for sequence in range(1, last + 1):
            run.send(run.discard(acknowledged_sequence=sequence - 1))
        ends = []
        for event in stream:
            if event.HasField("call_outcome"):
                ends.append(event.call_outcome)
                if event.call_outcome.sequence == last:
                    break
        stream.cancel()

    assert ends[0].sequence == 1
    assert any(end.missed_outcomes for end in ends)
    assert sum(end.missed_outcomes for end in ends) + len(ends) == last
    for one, two in itertools.pairwise(ends):
        assert two.sequence == one.sequence + 1 + two.missed_outcomes


async def test_it_can_be_awaited_beside_the_loop(client: mint.ServiceClient) -> None:
    run = await client.create_lora_training_client_async(rank=4)

    async def follow() -> list[int]:
        return [event.call_outcome.step async for event in watch if event.call_outcome]

    with run.watch() as watch:
        assert (await anext(watch)).training_run
        following = asyncio.create_task(follow())
        for _ in range(2):
            await run.forward_backward([DATUM])
            await run.optim_step(types.AdamParams())
        await client.delete_training_run_async(run.training_run_id)
        assert await asyncio.wait_for(following, CALL_LIMIT_S) == [0, 1, 1, 2]
