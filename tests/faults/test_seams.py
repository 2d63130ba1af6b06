"""Where two promises meet: deletion and arrival, a backup and its store, one damaged record and all
others, journals of before and today's server. The engine is one of sums without a model.
"""

import base64
import json
import signal
import sqlite3
import tarfile
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from checkpoint_store import CheckpointStore
from mint_core.lora.spec import lora_a_name
from mintrpc.v1 import trainer_pb2, trainer_pb2_grpc
from tests.engines.rows import MODULE
from tests.faults.test_recovery import await_journal, journal
from tests.resending import ADAM, insisting, resend, start_run, stub_of, train
from tests.supervised import Supervised, dying_at, summing
from tests.trainer_rpc import CALL_LIMIT_S, RawRun, datum, lora_config, refusal, refused, tensor
from trainer_service.recovery.state import backup, verify

OLD = Path(__file__).parents[1] / "data" / "state-of-5cff00a.tar.xz"


def deletion(run: RawRun, request_id: str = "deletion") -> trainer_pb2.DeleteTrainingRunRequest:
    return trainer_pb2.DeleteTrainingRunRequest(training_run_id=run.id, request_id=request_id)


def state(folder: Path) -> Path:
    return folder / "store" / ".state"


def stop(service: Supervised) -> None:
    service.kill_engine(signal.SIGSTOP)


def go_on(service: Supervised) -> None:
    service.kill_engine(signal.SIGCONT)


def failed(call: Any) -> str:
    """The reason for which a call under way was refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call.result(CALL_LIMIT_S)
    return refusal(caught.value).reason


def test_calls_of_a_run_that_is_being_deleted_are_not_found_and_leave_nothing(
    tmp_path: Path,
) -> None:
    with summing(tmp_path) as service, stub_of(service) as stub:
        run = start_run(stub)
        run.send(run.forward_backward())
        stop(service)
        waiting = [run.start(run.forward_backward()), run.start(run.optim_step(adam_params=ADAM))]
        run.wait_until_accepted(3)
        deleting = stub.DeleteTrainingRun.future(deletion(run), timeout=CALL_LIMIT_S)
        await_journal(tmp_path, "SELECT removing FROM runs", [(0,)])

        assert run.refused(run.forward_backward()).reason == "TRAINING_RUN_NOT_FOUND"
        assert [failed(call) for call in waiting] == ["TRAINING_RUN_NOT_FOUND"] * 2
        go_on(service)
        deleting.result(CALL_LIMIT_S)
        service.kill()

        for table in ("runs", "states", "calls", "payloads", "answers", "saved_rows"):
            assert journal(tmp_path, f"SELECT count(*) FROM {table}") == [(0,)], table
        later = start_run(stub)
        train(later, 2)  # whose calls have the same numbers
        assert journal(tmp_path, "SELECT number FROM runs") == [(2,)]
        assert verify(state(tmp_path)) == []


def test_a_flooded_run_is_deleted_at_once(tmp_path: Path) -> None:
    """What the engine does not have yet is taken back."""
    with summing(tmp_path) as service, stub_of(service) as stub:
        run, other = start_run(stub), start_run(stub)
        stop(service)
        flood = [run.start(run.forward_backward(*[datum([5, 6, 7])] * 40)) for _ in range(60)]
        run.wait_until_accepted(60)
        deleting = stub.DeleteTrainingRun.future(deletion(run), timeout=CALL_LIMIT_S)
        assert failed(flood[-1]) == "TRAINING_RUN_NOT_FOUND"
        go_on(service)

        deleting.result(CALL_LIMIT_S)
        train(other, 1)


@pytest.mark.parametrize("point", ["removal:begun", "removal:before-record"])
def test_a_deletion_that_a_crash_cuts_short_is_brought_to_its_end(
    point: str, tmp_path: Path
) -> None:
    with summing(tmp_path, dying_at(point), snapshot_s=0.02) as service, stub_of(service) as stub:
        run, other = start_run(stub), start_run(stub)
        for each in (run, other):
            train(each, 2)
            each.send(each.save_state("kept"))
        asked = deletion(run)
        asked.delete_checkpoints = True

        insisting(lambda: stub.DeleteTrainingRun(asked, timeout=CALL_LIMIT_S))

        assert service.starts == 2
        start_run(stub)  # when the engine is up
        await_journal(tmp_path, "SELECT number FROM runs WHERE removing IS NOT NULL", [])
        assert refused(stub.DeleteTrainingRun, deletion(run, "another")).reason == (
            "TRAINING_RUN_NOT_FOUND"
        )
        assert run.refused(run.forward()).reason == "TRAINING_RUN_NOT_FOUND"
        files = [path.name for path in (state(tmp_path) / "snapshots").iterdir()]
        assert not [name for name in files if run.id in name]
        store = CheckpointStore(tmp_path / "store")
        assert [str(each.path) for each in store.list(tenant="default")] == [
            f"mint://{other.id}/weights/kept"
        ]


def test_a_damaged_record_costs_its_run_and_nobody_else(tmp_path: Path) -> None:
    with summing(tmp_path) as service, stub_of(service) as stub:
        replayed, waiting, whole = (start_run(stub) for _ in range(3))
        for run in (replayed, whole):
            train(run, 2)
        waiting.send(waiting.forward_backward())
        stop(service)
        pending = waiting.start(waiting.optim_step(adam_params=ADAM))
        await_journal(tmp_path, "SELECT count(*) FROM calls WHERE effect IS NULL", [(1,)])
        service.kill()
        pending.cancel()
        service.stop()
    less = "substr(payload, 1, length(payload) - 1)"
    damage = f"UPDATE payloads SET payload = CAST({less} || x'ff' AS BLOB)"
    with sqlite3.connect(state(tmp_path) / "journal.db") as database:
        database.execute(f"{damage} WHERE id IN ((1 << 32) + 3, (2 << 32) + 2)")
    assert len(verify(state(tmp_path))) >= 1

    with summing(tmp_path) as service, stub_of(service) as stub:
        for run in (replayed, waiting, whole):
            run.stub = stub
        again = whole.forward_backward()
        insisting(lambda: whole.send(again))
        assert whole.send(whole.optim_step(adam_params=ADAM)).step == 3
        lost = replayed.refused(replayed.forward_backward())
        assert (lost.reason, lost.metadata["training_run_id"]) == (
            "TRAINING_RUN_LOST",
            replayed.id,
        )
        damaged = waiting.refused(waiting.optim_step(sequence=2, adam_params=ADAM))
        assert damaged.reason == "REQUEST_DAMAGED"  # which was never executed, so all else is well
        train(waiting, 1)
        assert replayed.describe().state_message.startswith("weights lost")
        other = start_run(stub)
        train(other, 1)


def test_a_record_that_the_journal_refuses_costs_its_run_and_nobody_else(tmp_path: Path) -> None:
    with summing(tmp_path) as service, stub_of(service) as stub:
        bad, good = start_run(stub), start_run(stub)
        with sqlite3.connect(state(tmp_path) / "journal.db", timeout=CALL_LIMIT_S) as database:
            database.execute("INSERT INTO answers VALUES ((1 << 32) + 1, x'4d')")

        assert bad.refused(bad.forward_backward()).reason == "TRAINING_RUN_LOST"
        assert bad.refused(bad.forward_backward()).reason == "TRAINING_RUN_LOST"
        train(good, 2)
        assert start_run(stub).describe().step == 0


def test_a_client_that_acknowledges_nothing_is_never_stuck(tmp_path: Path) -> None:
    with summing(tmp_path) as service, stub_of(service) as stub:
        run = start_run(stub)
        for first in range(1, 3001, 50):
            requests = [run.discard() for _ in range(50)]
            for request, call in [(each, run.start(each)) for each in requests]:
                with suppress(grpc.RpcError):
                    call.result(CALL_LIMIT_S)
                    continue
                resend(run, request)  # as the server was away
            if first in (801, 1501, 2301):
                service.kill()
        assert run.describe().next_sequence == 3001

        for _ in range(2):
            insisting(lambda: run.send(run.discard(sequence=3000 - 64)))
            told = refused(stub.DiscardGradient, run.discard(sequence=1))
            assert (told.code.name, told.reason) == ("FAILED_PRECONDITION", "ANSWER_DROPPED")
            service.kill()
            insisting(run.describe)


def test_a_save_after_a_backup_was_restored_is_of_what_is_saved(tmp_path: Path) -> None:
    """And not the one that the abandoned timeline had made under the same number and name."""

    def weights(path: str) -> list[float]:
        opened = CheckpointStore(tmp_path / "store").open(path, tenant="default")
        return list(opened.weights()[lora_a_name(MODULE)].flatten())

    with summing(tmp_path) as service, stub_of(service) as stub:
        run = start_run(stub)
        train(run, 1)
        backup(state(tmp_path), tmp_path / "backup")
        run.send(run.forward_backward(datum([50, 51, 52])))
        run.send(run.optim_step(adam_params=ADAM))
        abandoned = run.send(run.save_state("best", overwrite=True))
        adapter = run.send(run.save_for_sampler("adapter"))

    with (
        summing(tmp_path, state=tmp_path / "backup") as service,
        stub_of(service) as stub,
    ):
        run.stub, run.next_sequence = stub, 3
        insisting(lambda: run.send(run.forward_backward(datum([60, 61, 62]), sequence=3)))
        run.next_sequence = 4
        run.send(run.optim_step(adam_params=ADAM))
        saved = run.send(run.save_state("best", overwrite=True))
        assert (saved.step, abandoned.step) == (2, 2)
        assert saved.revision_path != abandoned.revision_path
        assert weights(saved.revision_path) != weights(abandoned.revision_path)
        again = run.send(run.save_for_sampler("adapter"))
        assert again.revision_path != adapter.revision_path


def test_an_answer_sent_twice_is_the_same_bytes_also_after_a_restart(tmp_path: Path) -> None:
    """Two targets at each position: their shape is part of it."""
    targets = tensor([[21, 22], [22, 23], [23, 24]], "int64")
    with summing(tmp_path) as service, stub_of(service) as stub:
        run = start_run(stub)
        request = run.forward_backward(datum([20, 21, 22, 23], target_tokens=targets))
        answer = run.send(request)
        assert list(answer.outputs[0].logprobs.shape) == [3, 2]
        assert run.send(request) == answer
        refusal_of = run.refused(bad := run.forward_backward(datum([99_999, 1, 2])))

        service.kill()

        again = insisting(lambda: run.send(request))
        assert again.SerializeToString(deterministic=True) == answer.SerializeToString(
            deterministic=True
        )
        assert run.refused(bad) == refusal_of


def test_a_state_that_commit_5cff00a_wrote_is_gone_on_with(tmp_path: Path) -> None:
    """Answers, refusals, remembered requests, a saved row, unanswered calls, checkpoints."""
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    entries = json.loads((tmp_path / "calls.json").read_text())
    as_of_now(state(tmp_path) / "journal.db")
    with summing(tmp_path, snapshot_s=1000) as service, stub_of(service) as stub:
        start_run(stub)
        runs = [told_again(stub, entry) for entry in entries]
        trained, waiting = (
            next(run for run in runs if run and run.metadata == metadata)
            for metadata in ({"name": "trained"}, {})
        )
        goes_on(stub, [sent(entry) for entry in entries], trained, seed=2, step=3)
        goes_on(stub, [sent(entry) for entry in entries], waiting, seed=3, step=1)
        loaded = start_run(
            stub,
            lora_config=None,
            checkpoint={"path": f"mint://{trained.training_run_id}/weights/middle"},
        )
        assert loaded.describe().step == 0
    assert verify(state(tmp_path)) == []


def as_of_now(file: Path) -> None:
    """Requests are remembered for a day, and runs kept for so long after their last call."""
    with closing(sqlite3.connect(file)) as journal, journal:
        journal.execute("UPDATE requests SET time = ?", [time.time()])
        journal.execute("UPDATE states SET update_time = ?", [time.time()])


def sent(entry: dict[str, str]) -> Any:
    kind = getattr(trainer_pb2, f"{entry['method']}Request")
    return kind.FromString(base64.b64decode(entry["request"]))


def told_again(
    stub: trainer_pb2_grpc.TrainerServiceStub, entry: dict[str, str]
) -> trainer_pb2.TrainingRun | None:
    """Sends what was sent before. Returns the run that it made, if it made one that is there."""
    request, method = sent(entry), getattr(stub, entry["method"])
    try:
        answer = insisting(lambda: method(request, timeout=CALL_LIMIT_S))
    except grpc.RpcError as error:
        told = refusal(error)
        if "status" in entry:
            status = status_pb2.Status.FromString(base64.b64decode(entry["status"]))
            assert told.message == status.message
            assert told.next_sequence == request.sequence + 1  # which that version did not say
        else:  # it is acknowledged, or a pending call with a bad token
            assert told.reason in ("ANSWER_ACKNOWLEDGED", "INVALID_REQUEST")
        return None
    if "answer" not in entry:
        return None
    before = type(answer).FromString(base64.b64decode(entry["answer"]))
    assert [getattr(answer, f.name) for f in answer.DESCRIPTOR.fields] == [
        getattr(before, f.name) for f in answer.DESCRIPTOR.fields
    ]
    made = entry["method"] == "CreateTrainingRun" and request.request_id != "gone"
    return answer.training_run if made else None


def goes_on(
    stub: trainer_pb2_grpc.TrainerServiceStub,
    requests: list[Any],
    old: trainer_pb2.TrainingRun,
    *,
    seed: int,
    step: int,
) -> None:
    """The run is, to the bit, one that does all the same today."""
    run = RawRun(stub, old, writer_epoch=1)
    twin = start_run(stub, lora_config=lora_config(rank=1, seed=seed))
    for request in requests:
        if getattr(request, "training_run_id", "") != run.id or not hasattr(request, "sequence"):
            continue
        if "Save" in type(request).__name__:
            request = twin.forward(sequence=request.sequence)
        request.training_run_id = twin.id
        request.acknowledged_sequence = 0
        with suppress(grpc.RpcError):  # as it was
            twin.send(request)
        run.next_sequence = twin.next_sequence = request.sequence + 1
    for each in (run, twin):
        discard = each.discard()
        insisting(lambda each=each, discard=discard: each.send(discard))
    assert run.describe().step == twin.describe().step == step
    assert run.send(run.forward()) == twin.send(twin.forward())
