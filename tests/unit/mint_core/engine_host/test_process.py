"""The front's side of an engine, with a real engine that breaks on request: the same, wherever it
runs.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from mint_core.engine_host import process as engine_process
from mint_core.engine_host.carried import NO_FILES
from mint_core.engine_host.on_ray.host import RayHosts
from mint_core.engine_host.on_ray.options import RayOptions
from mint_core.engine_host.process import EngineProcess
from mint_core.errors import EngineDied, EngineFault, InvalidRequest, Unavailable
from tests.engines.echo_jobs import (
    MODEL,
    Aside,
    Bug,
    Count,
    Crash,
    Echo,
    EchoConfig,
    Hang,
    Refuse,
    Work,
)
from tests.ray_cluster import RayPlaces

LIMIT_S = 60.0  # no test waits longer


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "RESTART_DELAY_S", 0.05)
    monkeypatch.setattr(engine_process, "WATCH_INTERVAL_S", 0.05)


Made = Callable[..., EngineProcess]
Running = Callable[..., AbstractAsyncContextManager[EngineProcess]]


@pytest.fixture(params=["processes", pytest.param("ray", marks=pytest.mark.ray)])
def made(request: pytest.FixtureRequest) -> Made:
    """Makes a front's side of an engine."""
    if request.param == "processes":
        return lambda config, module="tests.engines.echo": EngineProcess(module, config)
    places: RayPlaces = request.getfixturevalue("ray_places")
    return lambda config, module="tests.engines.echo": EngineProcess(module, config, places.next())


@pytest.fixture
def running(made: Made) -> Running:
    @asynccontextmanager
    async def run(config: EchoConfig | None = None) -> AsyncIterator[EngineProcess]:
        engine = made(config or EchoConfig())
        async with asyncio.timeout(LIMIT_S):
            await engine.start()
            try:
                yield engine
            finally:
                await engine.close()

    return run


async def test_the_engine_says_what_it_loaded(running: Running) -> None:
    async with running(EchoConfig(folder="/models/x")) as engine:
        assert (await engine.hello()).model.folder == "/models/x"
        assert (await engine.hello()).model.name == MODEL.name
        assert engine.ready
        assert engine.restarts == 0


async def test_calls_are_answered_each_with_its_own(running: Running) -> None:
    async with running() as engine:
        answers = await asyncio.gather(*(engine.call(Echo(str(n))) for n in range(100)))

    assert answers == [str(n) for n in range(100)]


@pytest.mark.parametrize("bundle", [1, 7])
async def test_parts_come_in_order_before_the_answer(running: Running, bundle: int) -> None:
    async with running() as engine:
        seen: list[list[object]] = [[] for _ in range(5)]
        calls = [engine.call(Count(100, bundle), on_part=parts.append) for parts in seen]
        for parts, call in zip(seen, [asyncio.create_task(call) for call in calls], strict=True):
            assert await call == "done"
            assert parts == list(range(100))


async def test_what_on_part_raises_the_call_raises(running: Running) -> None:
    def refuse(part: object) -> None:
        raise InvalidRequest(f"no {part}")

    async with running() as engine:
        with pytest.raises(InvalidRequest, match="no 0"):
            await engine.call(Count(3, bundle=3), on_part=refuse)
        assert await engine.call(Echo("still there")) == "still there"


async def test_parts_that_nobody_asked_for_fail_their_call_alone(running: Running) -> None:
    async with running() as engine:
        with pytest.raises(AssertionError, match="nobody asked"):
            await engine.call(Count(3, bundle=3))
        assert await engine.call(Echo("still there")) == "still there"


async def test_a_caller_that_left_gets_no_parts(running: Running) -> None:
    async with running() as engine:
        seen: list[object] = []
        call = asyncio.create_task(engine.call(Count(10, bundle=3), on_part=seen.append))
        await asyncio.sleep(0)
        call.cancel()
        assert await engine.call(Echo("next")) == "next"
        assert not seen


async def test_a_large_job_does_not_block_the_loop(running: Running) -> None:
    async with running() as engine:
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGSTOP)  # it reads nothing
        going_on = threading.Timer(LIMIT_S / 2, os.kill, (engine.pid, signal.SIGCONT))
        going_on.start()
        large = asyncio.create_task(engine.call(Echo("x" * 50_000_000)))
        await asyncio.sleep(0)
        assert going_on.is_alive(), "the pipe is full, and the loop must not wait for it"
        going_on.cancel()
        os.kill(engine.pid, signal.SIGCONT)
        assert len(await large) == 50_000_000


async def test_a_domain_error_crosses_the_pipe_whole(running: Running) -> None:
    async with running() as engine:
        with pytest.raises(InvalidRequest, match="`text` is too short") as caught:
            await engine.call(Refuse("`text` is too short"))

        assert caught.value.field == "text"
        assert caught.value.metadata == {"field": "text"}
        assert await engine.call(Echo("still there")) == "still there"


async def test_a_bug_is_an_engine_fault_without_its_details(running: Running) -> None:
    async with running() as engine:
        with pytest.raises(EngineFault, match="ZeroDivisionError") as caught:
            await engine.call(Bug())

        assert "secret" not in str(caught.value)
        assert engine.restarts == 0


async def test_a_crash_fails_the_calls_and_another_engine_answers_the_next(
    running: Running,
) -> None:
    async with running() as engine:
        first_pid = engine.pid
        crash = asyncio.create_task(engine.call(Crash(7)))
        behind = asyncio.create_task(engine.call(Echo("behind")))
        for call in (crash, behind):
            with pytest.raises(EngineFault, match="exit code 7"):
                await call
        assert not engine.ready

        assert await engine.call(Echo("again")) == "again"
        assert engine.pid != first_pid
        assert engine.restarts == 1
        assert engine.life == 2


async def test_a_killed_engine_is_noticed_without_any_call(running: Running) -> None:
    async with running() as engine:
        engine.changed.clear()
        assert engine.pid
        os.kill(engine.pid, signal.SIGKILL)
        await engine.changed.wait()
        assert not engine.ready
        assert engine.life == 2

        engine.changed.clear()
        await engine.changed.wait()
        assert engine.ready


async def test_an_engine_that_dies_was_at_the_first_call_that_it_does_not_do_aside(
    running: Running,
) -> None:
    async with running() as engine:
        jobs = (Aside(), Hang(), Echo("behind"))
        parts: list[object] = []
        calls = [asyncio.create_task(engine.call(job, on_part=parts.append)) for job in jobs]
        while not parts:
            await asyncio.sleep(0.01)
        assert engine.pid
        os.kill(engine.pid, signal.SIGKILL)
        died = await asyncio.gather(*calls, return_exceptions=True)

        assert [isinstance(each, EngineDied) and each.at_work for each in died] == [0, 1, 0]


async def test_of_work_aside_alone_an_engine_that_dies_was_at_the_first(running: Running) -> None:
    async with running() as engine:
        parts: list[object] = []
        calls = [asyncio.create_task(engine.call(Aside(), on_part=parts.append)) for _ in range(2)]
        while len(parts) < 2:
            await asyncio.sleep(0.01)
        assert engine.pid
        os.kill(engine.pid, signal.SIGKILL)
        died = await asyncio.gather(*calls, return_exceptions=True)

        assert [isinstance(each, EngineDied) and each.at_work for each in died] == [1, 0]


async def test_work_aside_may_take_its_time(running: Running) -> None:
    """As on a disk that does not answer: an engine that is otherwise well is not killed for it."""
    async with running() as engine:
        parts: list[object] = []
        call = engine.call(Aside(), silence_limit_s=0.1, on_part=parts.append)
        aside = asyncio.create_task(call)
        while not parts:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)  # longer than the limit, and several looks of the watchdog
        assert engine.restarts == 0
        assert await engine.call(Echo("still there")) == "still there"
        assert not aside.done()
        aside.cancel()


async def test_a_hung_engine_is_killed(running: Running) -> None:
    async with running() as engine:
        with pytest.raises(EngineFault, match="said nothing for 1 s and was killed"):
            await engine.call(Hang(), silence_limit_s=1.0)

        assert await engine.call(Echo("again")) == "again"


async def test_heartbeats_keep_a_slow_engine_alive(running: Running) -> None:
    async with running() as engine:
        assert await engine.call(Work(8, 0.2), silence_limit_s=1.0) == "done"
        assert engine.restarts == 0


async def test_calls_wait_while_another_engine_starts(running: Running) -> None:
    async with running() as engine:
        with pytest.raises(EngineFault):
            await engine.call(Crash(1))
        answers = await asyncio.gather(*(engine.call(Echo(str(n))) for n in range(5)))

        assert answers == ["0", "1", "2", "3", "4"]
        assert engine.restarts == 1


async def test_a_start_that_fails_says_why(made: Made) -> None:
    engine = made(EchoConfig(refusal="`base_model` is too large"))
    with pytest.raises(InvalidRequest, match="`base_model` is too large"):
        await asyncio.wait_for(engine.start(), LIMIT_S)

    assert not engine.ready
    assert engine.pid is None


async def test_a_fault_of_the_front_itself_ends_the_start(made: Made) -> None:
    engine = made(lambda: "no process can be sent this")
    with pytest.raises(EngineFault, match="front failed at it"):
        await asyncio.wait_for(engine.start(), LIMIT_S)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(engine.call(Echo("late")), LIMIT_S)


async def test_an_engine_that_dies_while_it_starts_is_reported(made: Made) -> None:
    engine = made(EchoConfig(), module="tests.engines.no_such_engine")
    with pytest.raises(EngineFault, match="exit code 1 while it started"):
        await asyncio.wait_for(engine.start(), LIMIT_S)


async def kill_starting(engine: EngineProcess, log: Path, starts: int) -> None:
    """Kills the first engines while they load, each once it has been told what."""
    for number in range(1, starts + 1):
        async with asyncio.timeout(LIMIT_S):
            while not log.exists() or len(log.read_text().splitlines()) < number:
                await asyncio.sleep(0.01)  # nothing tells of a file's change
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)


async def test_an_engine_that_is_killed_during_its_first_start_is_started_again(
    made: Made, tmp_path: Path
) -> None:
    """As one that is killed later; its callers wait."""
    config = EchoConfig(start_log=tmp_path / "starts", hangs_at_starts=(1, 2))
    engine = made(config)
    async with asyncio.timeout(LIMIT_S):
        start = asyncio.create_task(engine.start())
        await asyncio.sleep(0)
        early = asyncio.create_task(engine.call(Echo("early")))
        await kill_starting(engine, tmp_path / "starts", 2)
        assert (await start).model == MODEL
        assert await early == "early"
        assert (engine.restarts, engine.life) == (2, 1)
        await engine.close()


async def test_first_starts_that_are_killed_again_and_again_are_told(
    made: Made, tmp_path: Path
) -> None:
    config = EchoConfig(start_log=tmp_path / "starts", hangs_at_starts=(1, 2, 3))
    engine = made(config)
    start = asyncio.create_task(engine.start())
    await kill_starting(engine, tmp_path / "starts", 3)
    with pytest.raises(EngineFault, match="signal 9 while it started"):
        await asyncio.wait_for(start, LIMIT_S)


def test_an_engine_whose_front_dies_while_it_loads_ends_without_a_traceback(
    tmp_path: Path,
) -> None:
    """The kernel's signal comes too late for one that had not asked for it yet."""
    ours, theirs = socket.socketpair()
    with theirs:
        engine = subprocess.Popen(
            [sys.executable, "-m", "tests.engines.echo", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
    with ours:
        front = Connection(os.dup(ours.fileno()))
        front.send(EchoConfig(start_log=tmp_path / "starts", start_s=0.2))
        front.close()
    _, told = engine.communicate(timeout=LIMIT_S)
    assert engine.returncode == 1
    assert told.decode() == "echo engine starts\n"


async def test_a_caller_during_a_first_start_that_fails_is_told_to_try_again(made: Made) -> None:
    config = EchoConfig(refusal="`base_model` is too large")
    engine = made(config)
    start = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="cannot start: `base_model` is too large"):
        await asyncio.wait_for(engine.call(Echo("early")), LIMIT_S)
    with pytest.raises(InvalidRequest):
        await start


async def test_a_restart_that_fails_is_unavailable_and_tried_again(
    running: Running, tmp_path: Path
) -> None:
    config = EchoConfig(
        refusal="there is no memory left", start_log=tmp_path / "starts", failing_starts=(2,)
    )
    async with running(config) as engine:
        with pytest.raises(EngineFault):
            await engine.call(Crash(1))
        with pytest.raises(Unavailable, match="there is no memory left"):
            await engine.call(Echo("too early"))

        assert await engine.call(Echo("third start")) == "third start"
        assert engine.restarts == 2


async def test_closing_ends_the_calls_under_way_and_the_process(running: Running) -> None:
    async with running() as engine:
        pid = engine.pid
        call = asyncio.create_task(engine.call(Hang()))
        await asyncio.sleep(0)
        await engine.close()

        with pytest.raises(Unavailable, match="shutting down"):
            await call
        with pytest.raises(Unavailable, match="shutting down"):
            await engine.call(Echo("late"))
    assert pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_an_abandoned_call_does_not_disturb_the_next(running: Running) -> None:
    async with running() as engine:
        call = asyncio.create_task(engine.call(Work(3, 0.05)))
        await asyncio.sleep(0)
        call.cancel()
        assert await engine.call(Echo("next")) == "next"


async def test_a_job_that_cannot_be_sent_is_its_callers_error_alone(running: Running) -> None:
    async with running() as engine:
        with pytest.raises(AttributeError, match="pickle"):
            await engine.call(lambda: None)

        assert await engine.call(Echo("again")) == "again"
        assert engine.restarts == 0


async def test_a_place_in_a_cluster_that_was_given_back_may_be_once_more() -> None:
    place = RayHosts(RayOptions(address=""), lambda job: NO_FILES).place(0)
    await place.close()
    await place.close()
