"""What happens beside the users' scripts, on a thread each and in runs of another tenant: a call
that ends engines, a run that is deleted under load, one whose record is damaged, a store that keeps
all waiting. Each tells what it did and was told; whether that is right is for `verdicts`.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from random import Random
from threading import Timer
from typing import Any, Protocol

import mint
from mint import types
from tests.engines.mortal import POISON
from tests.harness import journal
from tests.harness.stage import LOOK_S, Stage, tenant
from tests.harness.user import RETRY_S, VOCABULARY_SIZE
from tests.harness.verdicts import (
    ANSWERED,
    Deleted,
    Lost,
    Neighbour,
    problems_of_deletion,
    problems_of_loss,
)
from tests.training_load import batch

LIMIT_S = 300.0
HELD_S = 60.0  # at most: an engine that says nothing for so long is taken for dead
REMOVAL_LIMIT_S = 120.0  # engines may be started meanwhile
PIPELINED = 12
ADAM = types.AdamParams(learning_rate=0.01)


class Aside(Protocol):
    def act(self) -> Iterator[str]:
        """Takes its time. Tells what is wrong."""

    def look_back(self) -> Iterator[str]:
        """At the end of the round: what is wrong by now."""


@dataclass
class Poison:
    """A call with which three engines die."""

    stage: Stage

    def act(self) -> Iterator[str]:
        given = {"target_tokens": POISON, "weights": [1.0] * len(POISON)}
        data = types.Datum(types.ModelInput.from_ints(POISON), given)
        with self.stage.client(-1) as service:
            run = service.create_lora_training_client(rank=1)
            told = outcome(run.forward_backward([data]))
            if told != "ENGINE_FAULT":
                yield f"a call that ends engines was told {told}"

    def look_back(self) -> Iterator[str]:
        yield from ()


@dataclass
class Deletion:
    """A run is deleted while its calls are under way, beside one that is not."""

    stage: Stage
    seed: int
    kill_after_s: float | None
    named: bool  # whether named checkpoints go too
    _run: str = ""
    _number: int = 0
    _calls: list[str] = field(default_factory=list)
    _neighbour: "_Pair | None" = None

    def act(self) -> Iterator[str]:
        with self.stage.client(-1) as service:
            run, self._neighbour = started(service, self.seed), _Pair(started(service, self.seed))
            self._run = run.training_run_id
            self._number = journal.number_of(self.stage.state, self._run)
            calls = [run.forward_backward(data(self.seed)) for _ in range(PIPELINED)]
            calls.append(run.optim_step(ADAM))
            timer = Timer(self.kill_after_s or 0.0, self.stage.trainer.kill)
            if self.kill_after_s is not None:
                timer.start()
            service.delete_training_run(self._run, delete_checkpoints=self.named)
            self._calls = [outcome(call) for call in calls]
            self._neighbour.go_on()
        if self.kill_after_s is not None:
            timer.join()
        self._await_removal()
        yield from self.look_back()

    def _await_removal(self) -> None:
        """A deletion that a crash cut short is answered again before it comes to its end."""
        deadline = time.monotonic() + REMOVAL_LIMIT_S
        while journal.left_of(self.stage.state, self._number) and time.monotonic() < deadline:
            time.sleep(LOOK_S)  # nothing tells of a record's end

    def look_back(self) -> Iterator[str]:
        assert self._neighbour is not None
        with self.stage.client(-1) as service:
            listed = service.list_training_runs(1000).training_runs
            opened = told(lambda: service.open_training_run(self._run))
            again = told(lambda: service.delete_training_run(self._run))
            neighbour = self._neighbour.found(service)
        store = self.stage.store.list(tenant=tenant(len(self.stage.keys) - 1))
        rows = (self.stage.state / journal.ROWS).iterdir()
        yield from problems_of_deletion(
            Deleted(
                run=self._run,
                named=self.named,
                calls=tuple(self._calls),
                opened=opened,
                deleted_again=again,
                listed=any(run.training_run_id == self._run for run in listed),
                tables=tuple(journal.left_of(self.stage.state, self._number)),
                files=tuple(path.name for path in rows if self._run in path.name),
                checkpoints=tuple(str(m.path) for m in store if m.training_run_id == self._run),
            ),
            neighbour,
        )


@dataclass
class Damage:
    """A record of one run is damaged while the server is away, and none of its neighbour's."""

    stage: Stage
    seed: int
    random: Random
    _run: str = ""
    _damage: journal.Damage | None = None
    _calls: list[str] = field(default_factory=list)
    _neighbour: "_Pair | None" = None

    def act(self) -> Iterator[str]:
        with self.stage.client(-1) as service:
            run, self._neighbour = started(service, self.seed), _Pair(started(service, self.seed))
            self._run = run.training_run_id
            number = journal.number_of(self.stage.state, self._run)
            while not self._damage:  # a row that was saved meanwhile needs no records
                calls = [run.forward_backward(data(self.seed)) for _ in range(PIPELINED)]
                if self.random.random() < 0.5:
                    calls[0].result(LIMIT_S)
                time.sleep(self.random.uniform(0.1, 0.3))  # so much is accepted, or done
                with self.stage.trainer.away():
                    self._damage = journal.damage(self.stage.state, number, self.random)
                self._calls += [outcome(call) for call in calls]
            self._neighbour.go_on()
        yield from self.look_back()

    def look_back(self) -> Iterator[str]:
        assert self._neighbour is not None
        with self.stage.client(-1) as service:
            error = refused(lambda: self._call(service))
            neighbour = self._neighbour.found(service)
            runs = service.list_training_runs(1000).training_runs
        (message,) = [run.state_message for run in runs if run.training_run_id == self._run]
        yield from problems_of_loss(
            Lost(
                run=self._run,
                executed=self._damage == "done",
                calls=tuple(self._calls),
                reason=error.reason if error else ANSWERED,
                named=error.metadata.get("training_run_id", "") if error else "",
                message=message,
            ),
            neighbour,
        )

    def _call(self, service: mint.ServiceClient) -> None:
        """A run is lost when its weights are wanted."""
        run = service.open_training_run(self._run)
        run.forward(data(self.seed)).result(LIMIT_S)


@dataclass
class Held:
    """The store keeps everybody waiting, and the front answers all the same."""

    stage: Stage
    limit_s: float = HELD_S / 2  # for somebody to come, and for the answer

    def act(self) -> Iterator[str]:
        bad = self.stage.bad_store
        bad.hold()
        deadline = time.monotonic() + self.limit_s
        try:
            while not bad.someone_waits.exists() and time.monotonic() < deadline:
                time.sleep(LOOK_S)  # nothing tells of a file
            with mint.ServiceClient(
                base_url=self.stage.trainer.address,
                api_key=self.stage.keys[-1],
                timeout=self.limit_s,
            ) as service:
                error = refused(service.list_training_runs)
            if error:
                yield f"while the store kept others waiting, a question was told: {error}"
        finally:
            bad.mend("hold")

    def look_back(self) -> Iterator[str]:
        yield from ()


@dataclass
class _Pair:
    """A run that nothing is done to."""

    run: mint.TrainingClient
    steps: int = 1

    def go_on(self) -> None:
        self.run.forward_backward(data(self.steps)).result(LIMIT_S)
        self.run.optim_step(ADAM).result(LIMIT_S)
        self.steps += 1

    def found(self, service: mint.ServiceClient) -> Neighbour:
        runs = service.list_training_runs(1000).training_runs
        steps = [run.step for run in runs if run.training_run_id == self.run.training_run_id]
        saved = told(lambda: service.create_rest_client().get_checkpoint(kept(self.run)).result())
        return Neighbour(self.run.training_run_id, self.steps, tuple(steps), saved)


def started(service: mint.ServiceClient, seed: int) -> mint.TrainingClient:
    """A run at step 1, saved as `kept`."""
    run = service.create_lora_training_client(rank=1, seed=seed)
    run.forward_backward(data(seed)).result(LIMIT_S)
    run.optim_step(ADAM).result(LIMIT_S)
    while True:
        try:
            run.save_state("kept", overwrite=True).result(LIMIT_S)
            return run
        except mint.RateLimitError:
            time.sleep(RETRY_S)  # nothing tells of room


def kept(run: mint.TrainingClient) -> str:
    return f"mint://{run.training_run_id}/weights/kept"


def data(seed: int) -> list[types.Datum]:
    return batch(seed, VOCABULARY_SIZE, [5, 9])


def outcome(call: "Future[Any]") -> str:
    """Why a call was refused, or that it was answered."""
    return told(lambda: call.result(LIMIT_S))


def told(ask: Any) -> str:
    error = refused(ask)
    return error.reason if error else ANSWERED


def refused(ask: Any) -> mint.APIError | None:
    try:
        ask()
    except mint.APIError as error:
        return error
    return None
