"""What `python -m trainer_service.recovery.state` tells of a folder, and the copies it makes."""

import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mintrpc.v1 import trainer_pb2
from tests.resending import start_run, stub_of, train
from tests.servers import running_trainer
from tests.supervised import summing
from tests.trainer_rpc import CALL_LIMIT_S, create
from trainer_service.recovery import state


def tool(*words: object) -> tuple[int, str]:
    """Status and output of the command."""
    done = subprocess.run(
        [sys.executable, "-m", "trainer_service.recovery.state", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not done.stderr
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def left(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a trainer that was killed left: of one run a row and more, of another calls alone."""
    folder = tmp_path_factory.mktemp("left")
    with (
        running_trainer(
            qwen3_folder, folder, state=folder / "state", base_model_name="tiny", snapshot_s=0.2
        ) as service,
        stub_of(service) as stub,
    ):
        first, second = create(stub), create(stub)
        while not list((folder / "state" / "snapshots").iterdir()):
            train(first, 1)
        train(second, 2)
        second.send(second.forward_backward())
        service.process.kill()
    return folder / "state"


def test_it_tells_what_is_there(left: Path) -> None:
    status, output = tool(left, "inspect")

    assert status == 0
    lines = output.splitlines()
    assert lines[0].startswith("base model tiny ")
    head, *rows = (re.finditer(r"\S+( \S+)*", line) for line in lines[-3:])
    columns = [cell.start() for cell in head]
    assert len(columns) == 8
    for row in rows:
        assert [cell.start() for cell in row] == columns
    (first, second) = [line.split() for line in lines if line.startswith("run-")]
    assert second[1:6] == ["default", "2", "5", "0", "5"]
    assert int(first[4]) > 0


def test_a_whole_folder_is_called_so_and_damage_is_named(left: Path, tmp_path: Path) -> None:
    assert tool(left, "verify") == (0, "whole\n")
    for damage, told in (
        (cut_a_row, "bytes, not those it was written with"),
        (flip_a_bit_of_a_row, "has damaged weights"),
        (drop_a_row, "is not there"),
        (change("UPDATE payloads SET payload = x'4d'"), "is not the one that was sent"),
        (change("DELETE FROM payloads"), "the request of call 1 is missing"),
        (change("UPDATE answers SET answer = x'4d0b'"), "cannot be read"),
    ):
        copy = tmp_path / told.replace(" ", "-").replace(":", "")
        shutil.copytree(left, copy)
        damage(copy)
        found = "\n".join(state.verify(copy))
        assert told in found, found
    with sqlite3.connect(copy / "journal.db") as database:
        database.execute("PRAGMA user_version = 99")
    assert tool(copy, "verify")[0] == 1


def cut_a_row(folder: Path) -> None:
    (row,) = (folder / "snapshots").iterdir()
    row.write_bytes(row.read_bytes()[:-4])


def flip_a_bit_of_a_row(folder: Path) -> None:
    (row,) = (folder / "snapshots").iterdir()
    content = bytearray(row.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + 5] ^= 1
    row.write_bytes(content)


def drop_a_row(folder: Path) -> None:
    (row,) = (folder / "snapshots").iterdir()
    row.unlink()


def change(statement: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        with sqlite3.connect(folder / "journal.db") as database:
            database.execute(statement)

    return apply


def test_a_copy_made_under_load_is_whole_and_serves(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    with summing(here, snapshot_s=0.01) as service, stub_of(service) as stub:
        run = start_run(stub)
        copies = []
        for number in range(5):
            train(run, 5)
            pending = [run.start(run.forward_backward()) for _ in range(5)]
            copy = tmp_path / f"copy-{number}"
            state.backup(here / "store" / ".state", copy)
            copies.append(copy)
            for call in pending:
                call.result()
            run.send(run.optim_step())
        step = run.describe().step

    found = []
    for copy in copies:
        lines = state.inspect(copy)
        found.append(int(next(line for line in lines if line.startswith("run-")).split()[2]))
    assert found == sorted(found)
    assert found[-1] < step
    shutil.copytree(copies[2], there / "store" / ".state")
    with summing(there) as service, stub_of(service) as stub:
        run.stub = stub
        start_run(stub)  # when the engine is up
        opening = trainer_pb2.OpenTrainingRunRequest(training_run_id=run.id, request_id="copy")
        opened = stub.OpenTrainingRun(opening, timeout=CALL_LIMIT_S)
        run.writer_epoch, run.next_sequence = opened.writer_epoch, opened.next_sequence
        run.send(run.forward_backward())
        assert run.send(run.optim_step()).step == found[2] + 1


def test_what_is_no_state_folder_is_refused(tmp_path: Path, left: Path) -> None:
    status, output = tool(tmp_path, "inspect")
    assert status == 1
    assert "holds no journal.db" in output
    status, output = tool(left, "backup", left)
    assert status == 1
    assert "is not empty" in output
