"""A bounded queue per tenant, which clients wait for by themselves, and what tenants have used."""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

import mint
from mint import types
from mintrpc.v1 import trainer_pb2_grpc
from tests.answers import exact
from tests.keys import make_key
from tests.metrics import Samples, scrape, value
from tests.servers import RunningService, running_trainer
from tests.trainer_rpc import CALL_LIMIT_S, RawRun, create, datum
from tests.warm import children

CALLS, TOKENS = 3, 40


@dataclass(frozen=True, slots=True)
class Bounded:
    """A trainer on which a tenant may have few calls waiting."""

    service: RunningService
    keys: Mapping[str, str]  # by tenant

    def client(self, tenant: str) -> mint.ServiceClient:
        return mint.ServiceClient(base_url=self.service.address, api_key=self.keys[tenant])

    @contextmanager
    def engine_stopped(self) -> Iterator[None]:
        """Holds the engine: what it is given waits."""
        (engine,) = children(self.service.process.pid)
        os.kill(engine.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(engine.pid, signal.SIGCONT)

    def scrape(self) -> Samples:
        return scrape(self.service.metrics_address)


@pytest.fixture(scope="module")
def bounded(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bounded]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    keys = {tenant: make_key(tenant, file) for tenant in ("ann", "bob")}
    file.write_text(file.read_text().replace(" ann", " ann 2"))
    with running_trainer(
        qwen3_folder,
        tmp_path_factory.mktemp("store"),
        base_model_name="tiny",
        max_batch_tokens=256,
        queue_calls=CALLS,
        queue_tokens=TOKENS,
        keys=file,
    ) as service:
        yield Bounded(service, keys)


def batch(*tokens: int) -> list[types.Datum]:
    inputs = {"target_tokens": list(tokens[1:]), "weights": [1] * (len(tokens) - 1)}
    return [types.Datum(types.ModelInput.from_ints(tokens[:-1]), inputs)]


def train(client: mint.ServiceClient, steps: int) -> list[Any]:
    """A loop that sends everything at once; then every answer, in order."""
    run = client.create_lora_training_client(rank=4, seed=1)
    futures: list[Any] = []
    for step in range(steps):
        futures.append(run.forward_backward(batch(*range(step, step + 20))))
        futures.append(run.forward_backward(batch(step, 9, 40, 8)))
        futures.append(run.optim_step(types.AdamParams(learning_rate=0.01)))
    return [exact(future.result(60).metrics) for future in futures]


def await_accepted(run: RawRun, sequence: int) -> None:
    deadline = time.monotonic() + CALL_LIMIT_S
    while run.describe().next_sequence <= sequence:
        assert time.monotonic() < deadline


def await_accepted_of(client: mint.ServiceClient, run: mint.TrainingClient, sequence: int) -> None:
    deadline = time.monotonic() + CALL_LIMIT_S
    while client.get_training_run(run.training_run_id).next_sequence <= sequence:
        assert time.monotonic() < deadline


def test_a_client_waits_for_room_by_itself_and_loses_nothing(
    bounded: Bounded, trainer: RunningService
) -> None:
    """The same numbers as on a server with room for all of it: every call acted once, in order."""
    before = bounded.scrape()
    with bounded.client("ann") as narrow, mint.ServiceClient(base_url=trainer.address) as wide:
        assert train(narrow, 8) == train(wide, 8)

    refused = "mint_calls_total", {"method": "ForwardBackward", "code": "RESOURCE_EXHAUSTED"}
    assert value(bounded.scrape(), refused[0], **refused[1]) > value(
        before, refused[0], **refused[1]
    )


def test_a_full_queue_refuses_a_number_and_all_above_it(bounded: Bounded) -> None:
    options = {"metadata": [("x-api-key", bounded.keys["ann"])]}
    with grpc.insecure_channel(bounded.service.address) as channel:
        stub = trainer_pb2_grpc.TrainerServiceStub(channel)
        run, other = create(stub, options), create(stub, options)
        bobs = create(stub, {"metadata": [("x-api-key", bounded.keys["bob"])]})
        with bounded.engine_stopped():
            waiting = [run.start(run.forward_backward()) for _ in range(CALLS)]
            await_accepted(run, CALLS)
            requests = [run.forward_backward(), run.optim_step(), run.discard()]
            refusals = [run.refused(request) for request in requests]
            refusals.append(other.refused(other.optim_step()))
            bobs_call = bobs.start(bobs.forward_backward(datum(list(range(3, 60)))))
            await_accepted(bobs, 1)  # another tenant has room
        for refusal in refusals:
            assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert refusal.reason == "QUEUE_FULL"
            assert refusal.retry_after_s is not None
            assert refusal.metadata["max_calls"] == "3"
        assert [answer.result() for answer in [*waiting, bobs_call]]
        assert run.describe().next_sequence == CALLS + 1  # nothing was used up
        for request in requests:
            run.send(request)
        assert run.describe().step == 1


def test_the_place_in_the_queue_is_told(bounded: Bounded) -> None:
    with bounded.client("ann") as ann, bounded.client("bob") as bob:
        run, bobs = (client.create_lora_training_client(rank=4) for client in (ann, bob))
        run.forward_backward(batch(1, 2, 3)).result(60)  # so that the rate is known
        with run.watch() as watch:
            assert next(watch).training_run
            assert next(watch).queue_progress == types.QueueProgress(0, 0, 0.0)
            with bounded.engine_stopped():
                first = bobs.forward_backward(batch(*range(31)))
                await_accepted_of(bob, bobs, 1)
                second = run.forward_backward(batch(1, 2, 3))
                told = next(event.queue_progress for event in watch if event.queue_progress)
            assert told.waiting_calls == 1
            assert told.tokens_ahead == 30
            assert told.estimated_wait_s is not None
            while told.waiting_calls:
                told = next(event.queue_progress for event in watch if event.queue_progress)
            assert told == types.QueueProgress(0, 0, 0.0)
        first.result(60)
        second.result(60)


def test_usage_is_counted_by_tenant_and_exact(bounded: Bounded) -> None:
    before = bounded.scrape()
    for tenant, steps in (("ann", 1), ("bob", 2)):
        with bounded.client(tenant) as client:
            run = client.create_lora_training_client(rank=4)
            run.forward(batch(1, 2, 3, 4, 5, 6)).result(60)  # 5 tokens
            for _ in range(steps):
                run.forward_backward(batch(1, 2, 3, 4) + batch(7, 8)).result(60)  # 3 and 1
                run.optim_step(types.AdamParams()).result(60)
            with pytest.raises(mint.BadRequestError):
                run.optim_step(types.AdamParams()).result(60)  # no gradient
            with pytest.raises(mint.BadRequestError):
                run.forward_backward(batch(1, 9_999)).result(60)
    after = bounded.scrape()

    def added(tenant: str, name: str, **labels: str) -> float:
        labels |= {"tenant": tenant}
        return value(after, f"mint_usage_{name}_total", **labels) - value(
            before, f"mint_usage_{name}_total", **labels
        )

    for tenant, steps in (("ann", 1), ("bob", 2)):
        assert added(tenant, "tokens", kind="forward") == 5 + 4 * steps
        assert added(tenant, "tokens", kind="backward") == 4 * steps
        assert added(tenant, "optim_steps") == steps
        assert added(tenant, "engine_seconds") > 0
