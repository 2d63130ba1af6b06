"""What a trainer still knows after it died, and what it does with a call that kills its engines.

The engine is one of sums without a model: see tests.engines.rows.
"""

import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from mintrpc.v1 import trainer_pb2
from tests.engines.rows import DIFFERENT, NOT_FINITE, POISON, UNLUCKY, UNLUCKY_SEED
from tests.resending import ADAM, insisting, resend, start_run, stub_of, train
from tests.supervised import LIMIT_S, Supervised, summing
from tests.trainer_rpc import (
    CALL_LIMIT_S,
    RawRun,
    create_request,
    datum,
    lora_config,
    refused,
)
from trainer_service.journal.schema import DATABASE
from trainer_service.run.restoring import MOST_DEATHS


def journal(folder: Path, query: str) -> list[Any]:
    """What is on disk."""
    database = sqlite3.connect(f"file:{folder}/store/.state/journal.db?mode=ro", uri=True)
    try:
        return database.execute(query).fetchall()
    finally:
        database.close()


def await_journal(folder: Path, query: str, wanted: list[Any]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while journal(folder, query) != wanted:
        assert time.monotonic() < deadline, journal(folder, query)
        time.sleep(0.02)  # nothing tells of a commit


def test_answers_and_refusals_outlive_the_server(tmp_path: Path) -> None:
    with summing(tmp_path) as service, stub_of(service) as stub:
        request = create_request(metadata={"name": "first"})
        made = insisting(lambda: stub.CreateTrainingRun(request, timeout=CALL_LIMIT_S))
        run = RawRun(stub, made.training_run, made.writer_epoch)
        requests = [run.forward_backward(), run.optim_step(adam_params=ADAM)]
        answers = [run.send(each) for each in requests]
        bad = run.forward_backward(datum([99_999, 1, 2]))
        error = run.refused(bad)
        last = run.forward_backward(acknowledged_sequence=1)
        answer = run.send(last)

        service.kill()

        assert resend(run, requests[1]) == answers[1]
        assert run.send(last) == answer
        assert run.refused(bad) == error
        other = run.optim_step(sequence=2, adam_params={"learning_rate": 1.0})
        assert run.refused(other).reason == "SEQUENCE_REUSED"
        assert run.refused(requests[0]).reason == "ANSWER_ACKNOWLEDGED"
        assert stub.CreateTrainingRun(request, timeout=CALL_LIMIT_S) == made
        request.metadata["name"] = "second"
        assert refused(stub.CreateTrainingRun, request).reason == "REQUEST_ID_REUSED"
        assert run.describe().metadata == {"name": "first"}
        assert run.describe().create_time == made.training_run.create_time


def test_a_script_that_comes_back_goes_on_where_the_run_is(tmp_path: Path) -> None:
    with summing(tmp_path) as service, stub_of(service) as stub:
        run = start_run(stub)
        train(run, 2)
        run.send(run.forward_backward())
        opening = trainer_pb2.OpenTrainingRunRequest(training_run_id=run.id, request_id="again")
        first = stub.OpenTrainingRun(opening, timeout=CALL_LIMIT_S)

        service.kill()

        opened = insisting(lambda: stub.OpenTrainingRun(opening, timeout=CALL_LIMIT_S))
        assert opened == first
        assert (opened.writer_epoch, opened.next_sequence, opened.step) == (2, 6, 2)
        assert (opened.gradient_pending, opened.backward_count) == (True, 1)
        start_run(stub)  # when the engine is up too
        assert run.refused(run.optim_step()).reason == "WRITER_FENCED"
        run.writer_epoch, run.next_sequence = opened.writer_epoch, opened.next_sequence
        assert run.send(run.optim_step(backward_count=1)).step == 3


def test_what_was_accepted_is_done_though_its_sender_is_gone(tmp_path: Path) -> None:
    with summing(tmp_path) as service, stub_of(service) as stub:
        run, twin = start_run(stub), start_run(stub)
        service.kill_engine(signal.SIGSTOP)
        calls = [run.start(run.forward_backward()), run.start(run.optim_step(adam_params=ADAM))]
        await_journal(tmp_path, "SELECT count(*) FROM payloads", [(2,)])

        service.kill()
        for call in calls:
            call.cancel()

        opening = trainer_pb2.OpenTrainingRunRequest(training_run_id=run.id, request_id="again")
        opened = insisting(lambda: stub.OpenTrainingRun(opening, timeout=CALL_LIMIT_S))
        assert (opened.next_sequence, opened.step) == (3, 1)
        twin.send(twin.forward_backward())
        twin.send(twin.optim_step(adam_params=ADAM))
        run.writer_epoch = opened.writer_epoch
        assert run.send(run.forward()) == twin.send(twin.forward())


def test_a_run_is_not_opened_or_deleted_before_its_accepted_calls_have_their_turns(
    tmp_path: Path,
) -> None:
    with summing(tmp_path) as service, stub_of(service) as stub:
        run = start_run(stub)
        service.kill_engine(signal.SIGSTOP)
        calls = [run.start(run.forward_backward()), run.start(run.optim_step(adam_params=ADAM))]
        await_journal(tmp_path, "SELECT count(*) FROM payloads", [(2,)])
        service.kill()
        for call in calls:
            call.cancel()
        stop_engine(service)
        insisting(run.describe)  # it answers

        opening = trainer_pb2.OpenTrainingRunRequest(training_run_id=run.id, request_id="again")
        deletion = trainer_pb2.DeleteTrainingRunRequest(training_run_id=run.id, request_id="not")
        held = [
            stub.OpenTrainingRun.future(opening, timeout=CALL_LIMIT_S),
            stub.DeleteTrainingRun.future(deletion, timeout=CALL_LIMIT_S),
        ]
        for call in held:  # for a while: an engine is starting
            assert call.exception().code() is grpc.StatusCode.UNAVAILABLE

        service.kill_engine(signal.SIGCONT)
        opened = insisting(lambda: stub.OpenTrainingRun(opening, timeout=CALL_LIMIT_S))
        assert (opened.next_sequence, opened.step) == (3, 1)


def stop_engine(service: Supervised) -> None:
    """Keeps the engine that starts from starting."""
    deadline = time.monotonic() + LIMIT_S
    while not service.engines():
        assert time.monotonic() < deadline
    service.kill_engine(signal.SIGSTOP)


def test_a_call_that_kills_each_engine_is_found_and_its_neighbours_go_on(tmp_path: Path) -> None:
    with summing(tmp_path) as service, stub_of(service) as stub:
        poisoned, neighbour, twin = (start_run(stub) for _ in range(3))
        service.kill_engine(signal.SIGSTOP)
        calls = [
            neighbour.start(neighbour.forward_backward()),
            poisoned.start(poisoned.forward_backward(datum([20, POISON, 22]))),
            poisoned.start(poisoned.optim_step()),
            neighbour.start(neighbour.optim_step(adam_params=ADAM)),
        ]
        for run in (poisoned, neighbour):
            run.wait_until_accepted(2)
        service.kill_engine(signal.SIGCONT)

        for call, code, reason in (
            (calls[1], grpc.StatusCode.INTERNAL, "ENGINE_FAULT"),
            (calls[2], grpc.StatusCode.FAILED_PRECONDITION, "GRADIENT_INCOMPLETE"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call.result(CALL_LIMIT_S)
            assert caught.value.code() is code
            assert reason in str(caught.value.trailing_metadata())
        answers = [calls[0].result(CALL_LIMIT_S), calls[3].result(CALL_LIMIT_S)]
        requests = [twin.forward_backward(), twin.optim_step(adam_params=ADAM)]
        assert answers == [twin.send(request) for request in requests]
        assert service.log_text().count("starting another") == 3
        assert train(poisoned, 1)[1].step == 1

        service.kill()  # the verdict outlives the server too

        start_run(stub)  # when it is up again
        poison = poisoned.forward_backward(datum([20, POISON, 22]), sequence=1)
        again = poisoned.refused(poison)
        assert again.reason == "ENGINE_FAULT"
        assert service.log_text().count("starting another") == 3


def test_a_replay_that_differs_is_told_and_not_hidden(tmp_path: Path) -> None:
    with summing(tmp_path, {}, {DIFFERENT: "1"}) as service, stub_of(service) as stub:
        run, other = start_run(stub), start_run(stub)
        train(run, 3)
        assert run.describe().inexact_replay_count == 0

        service.kill()

        resend(run, run.forward_backward())
        told = run.describe()
        assert told.state == trainer_pb2.TrainingRun.STATE_ACTIVE
        assert told.inexact_replay_count == 1
        assert "computed again for step 1 are not to the bit" in told.state_message
        assert "replayed inexactly" in service.log_text()
        assert other.describe().inexact_replay_count == 0

        service.kill()  # and what was told stays told; the third engine is as the first

        resend(run, run.optim_step())
        assert run.describe().inexact_replay_count == 1


@pytest.mark.parametrize(("how", "more_engines"), [("1", MOST_DEATHS), ("odd", 0)])
def test_a_run_that_no_engine_can_restore_is_given_up_and_others_go_on(
    tmp_path: Path, how: str, more_engines: int
) -> None:
    """Whether engines end at it, or it fails and they go on."""
    with summing(tmp_path) as service, stub_of(service) as stub:
        unlucky = start_run(stub, lora_config=lora_config(seed=UNLUCKY_SEED))
        run = start_run(stub)
        train(unlucky, 1)
        train(run, 1)

        service.start_next_with({UNLUCKY: how})
        service.restart()

        resend(run, run.forward_backward())
        assert unlucky.refused(unlucky.forward_backward()).reason == "TRAINING_RUN_LOST"
        assert run.send(run.optim_step()).step == 2
        assert service.log_text().count("engine ready") == 1 + 1 + more_engines

        service.restart()
        assert resend(unlucky, unlucky.forward_backward()).outputs


def test_what_an_earlier_version_answered_with_nan_is_replayed_as_it_was(tmp_path: Path) -> None:
    """A refusal now is no refusal then: what was added is added again."""
    with summing(tmp_path, {}, {NOT_FINITE: "1"}) as service, stub_of(service) as stub:
        run, twin = start_run(stub), start_run(stub)
        train(run, 2)
        expected = train(twin, 3)[-1]
        run.send(run.forward_backward(datum([22, 21, 22, 23])))

        service.kill()

        assert resend(run, run.optim_step(adam_params=ADAM)) == expected
        assert run.describe().inexact_replay_count == 0
        assert run.refused(run.forward()).reason == "LOSS_NOT_FINITE"


def test_a_rolling_restart_writes_rows_and_loses_nothing(tmp_path: Path) -> None:
    with summing(tmp_path, drain_s=10) as service, stub_of(service) as stub:
        run, twin = start_run(stub), start_run(stub)
        answers = train(run, 2)
        pending = run.start(run.forward_backward())
        run.wait_until_accepted(5)

        service.restart()

        assert service.exits == [0]
        assert journal(tmp_path, "SELECT sequence FROM saved_rows") == [(5,)]
        assert journal(tmp_path, "SELECT count(*) FROM payloads") == [(0,)]
        answers.append(pending.result())
        answers.append(resend(run, run.optim_step(adam_params=ADAM)))
        expected = train(twin, 2)
        expected.append(twin.send(twin.forward_backward()))
        expected.append(twin.send(twin.optim_step(adam_params=ADAM)))
        assert answers == expected


def test_a_drain_that_cannot_finish_ends_in_time_and_loses_nothing(tmp_path: Path) -> None:
    with summing(tmp_path, drain_s=1) as service, stub_of(service) as stub:
        run = start_run(stub)
        service.kill_engine(signal.SIGSTOP)
        call = run.start(run.forward_backward())
        run.wait_until_accepted(1)
        started_s = time.monotonic()

        service.restart()

        assert time.monotonic() - started_s < 5
        assert service.exits == [0]
        with pytest.raises(grpc.RpcError) as caught:
            call.result()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        again = run.forward_backward(sequence=1)
        assert len(resend(run, again).outputs) == 1


def test_a_run_moves_with_its_state_folder(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    with summing(here) as service, stub_of(service) as stub:
        run, twin = start_run(stub), start_run(stub)
        answers = train(run, 2)
        train(twin, 3)
        expected = twin.send(twin.forward())
    shutil.copytree(here / "store" / ".state", there / "store" / ".state")

    with summing(there) as service, stub_of(service) as stub:
        run.stub = stub
        last = run.optim_step(sequence=4, adam_params=ADAM)
        assert resend(run, last) == answers[3]
        run.send(run.forward_backward(datum([22, 21, 22, 23])))
        run.send(run.optim_step(adam_params=ADAM))
        assert run.send(run.forward()) == expected


def test_a_full_disk_stops_what_is_new_and_neither_answers_nor_deletions(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with small_disk(state), summing(tmp_path, state=state) as service, stub_of(service) as stub:
        run, other = start_run(stub), start_run(stub)
        train(run, 1)
        filler = state / "filler"
        waiting = filled_while_under_way(service, run, run.forward_backward(), filler)

        assert waiting.result(CALL_LIMIT_S).outputs  # there is a reserve for what was accepted
        refusal = run.refused(run.optim_step(adam_params=ADAM))
        assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refusal.reason == "JOURNAL_FULL"
        assert refusal.retry_after_s is not None
        delete = trainer_pb2.DeleteTrainingRunRequest(
            training_run_id=other.id, request_id="make room"
        )
        stub.DeleteTrainingRun(delete, timeout=CALL_LIMIT_S)
        filler.unlink()

        run.next_sequence -= 1  # the refused call has used up nothing
        assert resend(run, run.optim_step(adam_params=ADAM)).step == 2
        service.kill()
        assert resend(run, run.forward_backward()).outputs
        assert other.refused(other.forward()).code is grpc.StatusCode.NOT_FOUND


def test_a_load_waits_for_room_on_a_full_disk(tmp_path: Path) -> None:
    state, store = tmp_path / "state", tmp_path / "elsewhere"
    with (
        small_disk(state),
        summing(tmp_path, state=state, store=store) as service,
        stub_of(service) as stub,
    ):
        run = start_run(stub)
        train(run, 1)
        saved = run.send(run.save_state(name="early"))
        expected = run.send(run.forward())
        train(run, 1)
        filler = state / "filler"
        load = run.load_state(path=saved.path)
        loading = filled_while_under_way(service, run, load, filler, reserve=False)
        with pytest.raises(grpc.FutureTimeoutError):
            loading.result(2)
        filler.unlink()

        assert loading.result(CALL_LIMIT_S).revision_path == saved.revision_path
        assert f"run={run.id} waits for room" in service.log_text()
        assert run.send(run.forward()) == expected


def filled_while_under_way(
    service: Supervised, run: RawRun, request: Any, filler: Path, *, reserve: bool = True
) -> Any:
    """Fills a disk while the engine is at a call; without `reserve`, that is used up too."""
    service.kill_engine(signal.SIGSTOP)
    before = last_call_on_disk(filler.parent)
    call = run.start(request)
    deadline = time.monotonic() + LIMIT_S
    while last_call_on_disk(filler.parent) == before:
        assert time.monotonic() < deadline
    time.sleep(0.5)  # it is idle then: what it gives up meanwhile, the filler would have
    if not reserve:
        filler.with_name("reserve").unlink(missing_ok=True)
    fill(filler)
    service.kill_engine(signal.SIGCONT)
    return call


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(filler: Path) -> None:
    """Leaves nothing of a disk."""
    with filler.open("wb", buffering=0) as file:
        disk = os.statvfs(filler.parent)
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize)
        with suppress(OSError):
            while file.write(b"\0" * 65536) == 65536:
                pass


def last_call_on_disk(state: Path) -> int | None:
    with closing(sqlite3.connect(f"file:{state / DATABASE}?mode=ro", uri=True)) as journal:
        last: int | None = journal.execute("SELECT max(id) FROM calls").fetchone()[0]
        return last


def test_a_quota_stops_what_comes_in_and_warns_before(tmp_path: Path) -> None:
    quota = 300 * 1024 / 2**30
    with summing(tmp_path, state_quota_gib=quota) as service, stub_of(service) as stub:
        run = start_run(stub)
        batch = [datum(list(range(20, 60)))] * 20
        refusal = None
        deadline = time.monotonic() + LIMIT_S
        while refusal is None:
            assert time.monotonic() < deadline
            request = run.forward_backward(*batch)
            try:
                run.send(request)
            except grpc.RpcError:
                refusal = run.refused(request)

        assert refusal.reason == "STATE_QUOTA_EXCEEDED"
        assert refusal.retry_after_s is not None
        assert "that `state_quota_gib` allows" in service.log_text()
        stub.DeleteTrainingRun(
            trainer_pb2.DeleteTrainingRunRequest(training_run_id=run.id, request_id="delete")
        )


def test_a_state_folder_in_use_is_refused(tmp_path: Path) -> None:
    with summing(tmp_path) as service, stub_of(service):
        other = tmp_path / "other"
        other.mkdir()
        with summing(other, state=tmp_path / "store" / ".state") as second:
            second.await_start(2)
            line = next(line for line in second.log_text().splitlines() if " ERROR " in line)

    assert f"trainer cannot start: `--state` {tmp_path / 'store' / '.state'} is in use" in line
    assert second.exits[0] == 1
