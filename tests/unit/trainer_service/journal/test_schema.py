"""Which state folders are used, and what is said of the others."""

import fcntl
import os
import sqlite3
from pathlib import Path

import pytest

from trainer_service.journal import schema
from trainer_service.journal.schema import DATABASE, MIGRATIONS, StateRefused, migrate
from trainer_service.journal.writer import Journal


def use(folder: Path) -> None:
    Journal(folder).close()


def test_a_new_folder_is_made_and_used_again(tmp_path: Path) -> None:
    for _ in range(2):
        use(tmp_path / "deep" / "state")

    assert (tmp_path / "deep" / "state" / "snapshots").is_dir()


def test_a_folder_in_use_is_refused_with_its_holder(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(StateRefused, match=rf"in use by another trainer \(process {os.getpid()}\)"):
        use(tmp_path)
    journal.close()
    use(tmp_path)


def test_a_lock_without_a_process_says_so(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StateRefused, match="process unknown"):
            use(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")

    with pytest.raises(StateRefused, match=r"cannot be used: .*; choose another"):
        use(tmp_path / "state" / "folder")


def test_too_little_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "MIN_FREE_BYTES", 2**62)

    with pytest.raises(StateRefused, match="MiB of free space and needs"):
        use(tmp_path)


def test_a_newer_journal_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    use(tmp_path)
    with sqlite3.connect(tmp_path / DATABASE) as database:
        database.execute("PRAGMA user_version = 99")
    before = (tmp_path / DATABASE).read_bytes()

    with pytest.raises(StateRefused, match="written by a newer version"):
        use(tmp_path)
    assert (tmp_path / DATABASE).read_bytes() == before


def test_a_database_of_something_else_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / DATABASE) as database:
        database.execute("PRAGMA application_id = 7")
        database.execute("CREATE TABLE other (a)")

    with pytest.raises(StateRefused, match="of another program"):
        use(tmp_path)


@pytest.mark.parametrize("place", [0, 100, 3 * 4096])
def test_a_damaged_journal_is_refused(tmp_path: Path, place: int) -> None:
    use(tmp_path)
    path = tmp_path / DATABASE
    content = bytearray(path.read_bytes())
    content[place : place + 2000] = os.urandom(2000)
    path.write_bytes(content)

    with pytest.raises(StateRefused, match=r"cannot be used \(.*restore it from a backup"):
        use(tmp_path)


def test_what_was_acknowledged_before_is_dropped() -> None:
    database = sqlite3.connect(":memory:", isolation_level=None)
    migrate(database, 0, MIGRATIONS[:2])
    database.execute("INSERT INTO states VALUES (1, 0, 1, 7, 0, 0, NULL, 0, 0, '')")
    migrate(database, 2)
    assert database.execute("SELECT acknowledged, dropped FROM states").fetchall() == [(7, 7)]


def test_a_migration_happens_whole_or_not_at_all() -> None:
    database = sqlite3.connect(":memory:", isolation_level=None)
    migrate(database, 0)
    version = len(MIGRATIONS)
    more = (
        *MIGRATIONS,
        ("ALTER TABLE calls ADD COLUMN note TEXT;\nUPDATE calls SET note = '';\n",),
    )
    broken = (*more, ("CREATE TABLE last (a);\nCREATE TABLE calls (a);\n",))

    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        migrate(database, version, broken)
    assert database.execute("PRAGMA user_version").fetchone() == (version,)
    assert not database.execute("SELECT 1 FROM sqlite_schema WHERE name = 'last'").fetchall()

    migrate(database, version, more)
    assert database.execute("PRAGMA user_version").fetchone() == (version + 1,)
    assert database.execute("SELECT note FROM calls").fetchall() == []


@pytest.mark.parametrize("mask", [0o000, 0o777])
def test_only_its_owner_can_look_into_a_state_folder(tmp_path: Path, mask: int) -> None:
    state = tmp_path / "state"
    before = os.umask(mask)
    try:
        for _ in range(2):
            journal = Journal(state)
            journal.database.execute("PRAGMA user_version")
            modes = {str(p.relative_to(tmp_path)): p.stat().st_mode & 0o777 for p in files(state)}
            journal.close()
            state.chmod(0o755)  # as earlier versions made it
            (state / DATABASE).chmod(0o644)
    finally:
        os.umask(before)

    assert {name for name, mode in modes.items() if mode == 0o700} == {"state", "state/snapshots"}
    assert "state/journal.db-wal" in modes
    assert not any(mode & 0o077 for mode in modes.values())


def files(folder: Path) -> list[Path]:
    return [folder, *folder.rglob("*")]
