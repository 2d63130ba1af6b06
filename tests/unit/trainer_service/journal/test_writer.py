"""The journal's thread, on a real database."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from trainer_service.journal import writer
from trainer_service.journal.schema import DATABASE, KEPT_LOG_BYTES
from trainer_service.journal.writer import Journal, JournalFailed, JournalFull, RecordRefused

LIMIT_S = 20.0


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    made = Journal(tmp_path)
    made.start()
    async with asyncio.timeout(LIMIT_S):
        yield made
    await asyncio.to_thread(made.close)


def insert(name: str, value: str | int = "") -> writer.Statement:
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
        written = journal.write(insert(f"{number:02}"))
        written.add_done_callback(lambda _, number=number: note(number))  # type: ignore[misc]
    await journal.flush()

    assert [number for number, _ in seen] == list(range(50))
    assert all(count > number for number, count in seen)
    assert journal.commits < 50  # what was ready went together


async def test_what_nobody_waits_for_comes_to_disk_too(journal: Journal, tmp_path: Path) -> None:
    journal.write(insert("alone"), soon=False)

    while on_disk(tmp_path) != ["alone"]:
        await asyncio.sleep(0.01)


async def test_statements_of_one_write_take_effect_together(
    journal: Journal, tmp_path: Path
) -> None:
    await journal.write(insert("a"), insert("b"))

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
        written = journal.write(insert(name, "x" * 12_000))
        written.add_done_callback(lambda _, name=name: told.append(name))  # type: ignore[misc]

    while not isinstance(journal.trouble(), JournalFull):
        await asyncio.sleep(0.01)
    refusal = journal.trouble()
    assert isinstance(refusal, JournalFull)
    assert refusal.retry_after_s is not None
    assert journal.failure is None
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
    written = journal.write(insert("a", "x" * 100_000))
    while journal.trouble() is None:
        await asyncio.sleep(0.01)

    async with asyncio.timeout(LIMIT_S):
        await asyncio.to_thread(journal.close)

    assert on_disk(tmp_path) == []
    assert not written.done()


async def test_after_any_other_fault_nothing_is_told_any_more(journal: Journal) -> None:
    await journal.write(lambda db: db.execute("DROP TABLE calls"))
    written = journal.write(lambda db: db.execute("SELECT * FROM calls"))

    with pytest.raises(JournalFailed, match="no such table"):
        await journal.flush()
    with pytest.raises(JournalFailed):
        await journal.read(lambda db: None)
    with pytest.raises(JournalFailed):
        await written
    assert journal.failure is journal.trouble() is await journal.failed()


async def test_whatever_ends_its_thread_is_told_to_all_who_wait(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an error of the database: one that nobody thought of."""

    def surprise(name: str) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(writer, "fault_point", surprise)
    waiting = [journal.write(insert(str(number))) for number in range(3)]

    for written in waiting:
        with pytest.raises(JournalFailed, match="no memory"):
            await written
    with pytest.raises(JournalFailed):
        await journal.flush()


@pytest.mark.parametrize(
    "bad",
    [
        insert("twice"),  # what is there already
        insert("number", 2**70),  # more than the database takes
        insert("text", "\udc80"),  # no character
        lambda db: 1 / 0,
    ],
)
async def test_a_bad_write_is_refused_alone(
    journal: Journal, tmp_path: Path, bad: writer.Statement
) -> None:
    await journal.write(insert("twice"))
    before, refused, behind = [
        journal.write(statement) for statement in (insert("before"), bad, insert("zzz"))
    ]

    with pytest.raises(RecordRefused):
        await refused
    await before
    await behind

    assert on_disk(tmp_path) == ["before", "twice", "zzz"]
    assert journal.trouble() is None


async def test_what_is_raised_where_one_write_is_waited_for_keeps_no_other_from_its_word(
    journal: Journal,
) -> None:
    """Of one transaction: an answer's reader may fail, or have left."""
    told: list[str] = []
    raised: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: raised.append(context["exception"]))
    writes = [journal.write(insert(name)) for name in ("left", "raises", "behind")]
    writes[0].cancel()
    writes[1].add_done_callback(lambda _: 1 / 0)  # type: ignore[arg-type, return-value]
    writes[2].add_done_callback(lambda _: told.append("behind"))

    await journal.flush()

    assert told == ["behind"]
    assert [type(error) for error in raised] == [ZeroDivisionError]
    assert journal.trouble() is None


async def test_a_read_that_fails_harms_nobody(journal: Journal, tmp_path: Path) -> None:
    written = journal.write(insert("a"))
    with pytest.raises(RecordRefused):
        await journal.read(lambda db: 1 / 0)

    await written
    assert on_disk(tmp_path) == ["a"]


async def test_the_log_goes_into_the_database_when_there_is_time(
    journal: Journal, tmp_path: Path
) -> None:
    log = tmp_path / f"{DATABASE}-wal"
    await journal.write(insert("a", "x" * 1_000_000))
    while (tmp_path / DATABASE).stat().st_size < 1_000_000:
        await asyncio.sleep(0.05)
    size_bytes = log.stat().st_size
    for number in range(10):
        await journal.write(insert(f"b{number}", "x" * 10_000))
    assert log.stat().st_size == size_bytes  # begun anew, in the file that is there
    await journal.write(insert("c", "x" * 2 * KEPT_LOG_BYTES))
    while (tmp_path / DATABASE).stat().st_size < 2 * KEPT_LOG_BYTES:
        await asyncio.sleep(0.05)
    await journal.write(insert("d"))
    assert log.stat().st_size <= KEPT_LOG_BYTES
    journal.write(lambda db: db.execute("DELETE FROM server"))
    await journal.flush()
    while (tmp_path / DATABASE).stat().st_size > 500_000:  # free pages are given back
        await asyncio.sleep(0.05)
