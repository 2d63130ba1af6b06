"""The journal's thread, on a real database."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mint_core.errors import MintError
from trainer_service.journal import writer
from trainer_service.journal.schema import DATABASE
from trainer_service.journal.writer import Journal, JournalFailed, JournalFull

LIMIT_S = 20.0


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    made = Journal(tmp_path)
    made.start()
    async with asyncio.timeout(LIMIT_S):
        yield made
    await asyncio.to_thread(made.close)


def insert(name: str, value: str = "") -> writer.Statement:
    return lambda db: db.execute("INSERT INTO server VALUES (?, ?)", (name, value))


def on_disk(folder: Path) -> list[str]:
    """What another process would see."""
    database = sqlite3.connect(f"file:{folder / DATABASE}?mode=ro", uri=True)
    try:
        return [name for (name,) in database.execute("SELECT name FROM server ORDER BY name")]
    finally:
        database.close()


async def test_who_waits_is_called_in_order_once_it_is_on_disk(
    journal: Journal, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []

    def note(number: int) -> None:
        seen.append((number, len(on_disk(tmp_path))))

    for number in range(50):
        journal.write(insert(f"{number:02}"), then=lambda number=number: note(number))  # type: ignore[misc]
    await journal.flush()

    assert [number for number, _ in seen] == list(range(50))
    assert all(count > number for number, count in seen)
    assert journal.commits < 50  # what was ready went together


async def test_what_nobody_waits_for_comes_to_disk_too(journal: Journal, tmp_path: Path) -> None:
    journal.write(insert("alone"))

    while on_disk(tmp_path) != ["alone"]:
        await asyncio.sleep(0.01)


async def test_statements_of_one_write_take_effect_together(
    journal: Journal, tmp_path: Path
) -> None:
    journal.write(insert("a"), insert("b"), then=lambda: None)
    await journal.flush()

    assert on_disk(tmp_path) == ["a", "b"]
    assert await journal.read(lambda db: db.execute("SELECT count(*) FROM server").fetchone()) == (
        2,
    )


async def test_a_read_sees_what_was_written_before_it(journal: Journal) -> None:
    journal.write(insert("before"))

    assert await journal.read(lambda db: db.execute("SELECT name FROM server").fetchall()) == [
        ("before",)
    ]


async def test_a_full_disk_is_waited_for(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "RETRY_S", 0.05)
    pages = await journal.read(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
    await journal.read(lambda db: db.execute(f"PRAGMA max_page_count = {pages + 5}").fetchall())
    told: list[str] = []
    for name in ("a", "b", "c"):
        journal.write(insert(name, "x" * 12_000), then=lambda name=name: told.append(name))  # type: ignore[misc]

    while not isinstance(journal.trouble(), JournalFull):
        await asyncio.sleep(0.01)
    refusal = journal.trouble()
    assert isinstance(refusal, JournalFull)
    assert refusal.retry_after_s is not None
    assert not journal.failed
    assert set(told) == set(on_disk(tmp_path))
    # The thread sleeps between attempts; a limit of the test's stands for the disk's.
    journal.database.execute("PRAGMA max_page_count = 100000")
    await journal.flush()

    assert told == ["a", "b", "c"]
    assert on_disk(tmp_path) == told
    assert journal.trouble() is None


async def test_it_ends_on_a_full_disk_without_waiting_for_room(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.database.execute("PRAGMA max_page_count = 1")  # as many as there are
    journal.start()
    journal.write(insert("a", "x" * 100_000), then=lambda: pytest.fail("it is not on disk"))
    while journal.trouble() is None:
        await asyncio.sleep(0.01)

    async with asyncio.timeout(LIMIT_S):
        await asyncio.to_thread(journal.close)

    assert on_disk(tmp_path) == []


async def test_after_any_other_fault_nothing_is_told_any_more(journal: Journal) -> None:
    failures: list[MintError] = []
    journal.on_failure = failures.append
    journal.write(lambda db: db.execute("DROP TABLE calls"), then=lambda: None)
    await journal.flush()
    journal.write(lambda db: db.execute("SELECT * FROM calls"), then=lambda: pytest.fail("told"))

    with pytest.raises(JournalFailed, match="no such table"):
        await journal.flush()
    with pytest.raises(JournalFailed):
        await journal.read(lambda db: None)
    assert journal.failed
    assert failures == [journal.trouble()]


async def test_the_log_goes_into_the_database_when_there_is_time(
    journal: Journal, tmp_path: Path
) -> None:
    journal.write(insert("a", "x" * 1_000_000), then=lambda: None)
    await journal.flush()
    log = tmp_path / f"{DATABASE}-wal"

    while log.stat().st_size:
        await asyncio.sleep(0.05)
    assert (tmp_path / DATABASE).stat().st_size > 1_000_000
    journal.write(lambda db: db.execute("DELETE FROM server"), then=lambda: None)
    await journal.flush()
    while (tmp_path / DATABASE).stat().st_size > 500_000:  # free pages are given back
        await asyncio.sleep(0.05)
