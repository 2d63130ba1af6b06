"""The harness finds a run's records in a journal, and damages one of them alone."""

from pathlib import Path
from random import Random

from tests.harness import journal
from tests.resending import start_run, stub_of, train
from tests.supervised import summing
from trainer_service.recovery.state import verify


def test_records_of_one_run_are_found_and_damaged(tmp_path: Path) -> None:
    with summing(tmp_path, snapshot_s=1000) as service, stub_of(service) as stub:
        run, other = start_run(stub), start_run(stub)
        train(run, 2)
        train(other, 2)
        with service.away():
            state = tmp_path / "store" / ".state"
            assert verify(state) == []

            number = journal.number_of(state, run.id)
            assert set(journal.left_of(state, number)) >= {"runs", "states", "calls", "payloads"}
            assert journal.left_of(state, 99) == []
            assert journal.damage(state, 99, Random(1)) is None
            assert journal.damage(state, number, Random(1)) == "done"
            found = verify(state)
            assert found
            assert [line for line in found if not line.startswith(run.id)] == []
