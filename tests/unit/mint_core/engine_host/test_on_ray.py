"""Engines on the nodes of a cluster: what of it dies, who may come in, and files on their way."""

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from mint_core.engine_host import process as engine_process
from mint_core.engine_host.on_ray.certificates import Authority, agent_context, request
from mint_core.engine_host.process import EngineProcess
from mint_core.errors import EngineDied, EngineFault, FailedPrecondition, ResourceExhausted
from tests.engines.echo_jobs import Copy, Echo, EchoConfig, Hang, copied_files
from tests.ray_cluster import NODE_CPUS, RayPlaces, add_node, agent_of, kill_node_of

pytestmark = pytest.mark.ray

LIMIT_S = 90.0


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "RESTART_DELAY_S", 0.05)


@asynccontextmanager
async def running(places: RayPlaces, count: int = 1) -> AsyncIterator[list[EngineProcess]]:
    engines = [
        EngineProcess("tests.engines.echo", EchoConfig(), places.next()) for _ in range(count)
    ]
    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(*(engine.start() for engine in engines))
        try:
            yield engines
        finally:
            await asyncio.gather(*(engine.close() for engine in engines))


@asynccontextmanager
async def places(cluster: Any, **options: Any) -> AsyncIterator[RayPlaces]:
    """By a driver of their own."""
    own = RayPlaces(cluster, copied_files, **options)
    try:
        yield own
    finally:
        await own.close()


def process_of(engine: EngineProcess) -> psutil.Process:
    assert engine.pid is not None
    return psutil.Process(engine.pid)


async def gone(*processes: psutil.Process) -> None:
    async with asyncio.timeout(LIMIT_S):
        while any(each.is_running() and each.status() != "zombie" for each in processes):
            await asyncio.sleep(0.05)  # nothing tells of the end of another's child


async def test_an_actor_that_dies_takes_its_engine_along_and_another_comes(
    ray_places: RayPlaces,
) -> None:
    async with running(ray_places) as (engine,):
        first = process_of(engine)
        call = asyncio.create_task(engine.call(Hang()))
        await asyncio.sleep(0)
        agent_of(first).kill()
        with pytest.raises(EngineDied, match="actor or its machine was lost"):
            await call
        assert await engine.call(Echo("again")) == "again"
        await gone(first)


async def test_a_driver_that_dies_ends_all_engines_and_others_come(ray_cluster: Any) -> None:
    async with places(ray_cluster) as own, running(own, 2) as engines:
        before = [process_of(engine) for engine in engines]
        agents = [agent_of(engine) for engine in before]
        assert own.hosts.driver_pid
        os.kill(own.hosts.driver_pid, signal.SIGKILL)
        await gone(*before, *agents)
        answers = await asyncio.gather(*(engine.call(Echo("again")) for engine in engines))
        assert answers == ["again", "again"]


async def test_a_driver_that_dies_at_its_start_keeps_nobody_waiting(ray_cluster: Any) -> None:
    async with places(ray_cluster) as own:
        engine = EngineProcess("tests.engines.echo", EchoConfig(), own.next())
        start = asyncio.create_task(engine.start())
        while own.hosts.driver_pid is None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # it is asked for an engine, and has not joined the cluster
        os.kill(own.hosts.driver_pid, signal.SIGKILL)
        try:
            await asyncio.wait_for(start, LIMIT_S)
            assert (engine.life, engine.restarts) == (1, 1)
        finally:
            await engine.close()


async def test_a_lost_node_costs_a_life_and_the_other_node_takes_over(ray_cluster: Any) -> None:
    """Spread, one of two engines is beside the head, the other is not."""
    async with (
        places(ray_cluster, strategy="spread", count=2) as own,
        running(own, 2) as engines,
    ):
        raylets = {agent_of(process_of(engine)).ppid(): engine for engine in engines}
        assert len(raylets) == 2, "they are on two nodes"
        head = ray_cluster.head_node.all_processes["raylet"][0].process.pid
        stays = raylets.pop(head)
        (lost,) = raylets.values()
        process = process_of(lost)
        kill_node_of(ray_cluster, process)
        await gone(process)
        while lost.life == 1:
            await asyncio.sleep(0.05)
        try:
            assert await lost.call(Echo("again")) == "again"
            assert agent_of(process_of(lost)).ppid() == head
            assert (stays.life, lost.life) == (1, 2)
        finally:
            add_node(ray_cluster)


FRONT = """
import asyncio, sys
from mint_core.engine_host.process import EngineProcess
from tests.engines.echo_jobs import EchoConfig
from tests.ray_cluster import NODE_CPUS, RayPlaces

class Cluster:
    address = sys.argv[1]

async def main():
    places = RayPlaces(Cluster)
    engine = EngineProcess("tests.engines.echo", EchoConfig(), places.next())
    await engine.start()
    print(engine.pid, places.hosts.driver_pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_front_that_is_killed_leaves_no_engine_and_no_actor(ray_cluster: Any) -> None:
    command = [sys.executable, "-c", FRONT, ray_cluster.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as front:
        assert front.stdout
        engine, driver = map(int, (await asyncio.to_thread(front.stdout.readline)).split())
        left = [psutil.Process(engine), agent_of(psutil.Process(engine)), psutil.Process(driver)]
        left[0].suspend()  # as one that computes, and does not look
        front.kill()
        await gone(*left)


async def test_without_room_an_engine_waits_and_leaves_nothing_if_it_is_not_wanted(
    ray_cluster: Any,
) -> None:
    async with places(ray_cluster, cpus=1000) as own:
        engine = EngineProcess("tests.engines.echo", EchoConfig(), own.next())
        start = asyncio.create_task(engine.start())
        done, _ = await asyncio.wait({start}, timeout=3)
        assert not done
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start


async def test_an_engine_that_is_closed_leaves_its_room_to_the_next(ray_cluster: Any) -> None:
    """The cluster has room for two such engines."""
    most = 0.75 * NODE_CPUS
    async with places(ray_cluster, cpus=most, count=2) as own, running(own, 2) as (first, second):
        await first.close()
        async with running(own) as (third,):
            assert await third.call(Echo("in its place")) == "in its place"
            assert await second.call(Echo("well")) == "well"


async def test_a_cluster_that_is_not_there_is_told_by_its_option() -> None:
    class Nowhere:
        address = "127.0.0.1:1"

    async with places(Nowhere) as own:
        engine = EngineProcess("tests.engines.echo", EchoConfig(), own.next())
        with pytest.raises(FailedPrecondition, match=r"`ray_address` 127.0.0.1:1 cannot be"):
            await asyncio.wait_for(engine.start(), LIMIT_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def strangers() -> dict[str, Callable[[], ssl.SSLContext | None]]:
    def nameless() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context

    def foreign() -> ssl.SSLContext:
        theirs = Authority()
        key, asked = request()
        context = agent_context(theirs.certificate, theirs.sign(asked, "engine-1"), key)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context

    return {"no TLS": lambda: None, "no certificate": nameless, "another authority": foreign}


async def test_who_has_no_certificate_of_the_driver_is_not_heard(ray_cluster: Any) -> None:
    port = free_port()
    async with places(ray_cluster, listen=f"127.0.0.1:{port}") as own, running(own) as (engine,):
        for name, context in strangers().items():
            heard = b""
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context())
                writer.write(b"\x03\x00\x00\x00\x02[]")
                heard = await reader.read()
                writer.close()
            assert len(heard) < 8, name  # an alert of TLS's at most
        assert await engine.call(Echo("well")) == "well"
        assert engine.restarts == 0


async def test_files_are_brought_before_a_job_and_fetched_before_its_answer(
    ray_cluster: Any, tmp_path: Path
) -> None:
    source, target = tmp_path / "front" / "source", tmp_path / "front" / "later" / "target"
    source.parent.mkdir()
    target.parent.mkdir()
    source.write_bytes(os.urandom(3_000_000))
    source.chmod(0o600)
    async with places(ray_cluster, folder=str(tmp_path / "node")) as own:
        async with running(own) as (engine,):
            there = Path(await engine.call(Copy(source, target, times=2)))
            assert there.is_relative_to(tmp_path / "node")
            assert target.read_bytes() == 2 * source.read_bytes()
            first = there.stat().st_ino
            await engine.call(Copy(source, target))
            assert there.stat().st_ino == first, "it is there, and is not brought again"
            assert target.read_bytes() == source.read_bytes()
            await engine.call(Copy(target, tmp_path / "front" / "third"))  # as it was written
            source.write_bytes(b"another")
            await engine.call(Copy(source, target))
            assert target.read_bytes() == b"another"
            source.unlink()
            with pytest.raises(EngineFault, match="FileNotFoundError"):
                await engine.call(Copy(source, target))
        assert not list((tmp_path / "node").glob("*")), "it is removed with its engine"


async def test_files_of_two_jobs_that_end_together_do_not_mix(
    ray_cluster: Any, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(5_000_000))
    targets = [tmp_path / f"target-{number}" for number in range(4)]
    async with (
        places(ray_cluster, folder=str(tmp_path / "node")) as own,
        running(own) as (engine,),
    ):
        await asyncio.gather(*(engine.call(Copy(source, target)) for target in targets))
        assert all(target.read_bytes() == source.read_bytes() for target in targets)


async def test_a_disk_of_the_fronts_that_takes_nothing_is_told_in_the_jobs_words(
    ray_cluster: Any, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"1" * 10_000)
    async with (
        places(ray_cluster, folder=str(tmp_path / "node")) as own,
        running(own) as (engine,),
    ):
        with pytest.raises(ResourceExhausted, match="full"):
            await engine.call(Copy(source, tmp_path / "missing" / "target"))
        await engine.call(Copy(source, tmp_path / "target"))
        assert (tmp_path / "target").read_bytes() == source.read_bytes()
        assert engine.restarts == 0


async def test_an_engine_that_dies_while_files_move_leaves_none_half_there(
    ray_cluster: Any, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"x" * 100_000_000)
    async with (
        places(ray_cluster, folder=str(tmp_path / "node")) as own,
        running(own) as (engine,),
    ):
        copy = asyncio.create_task(engine.call(Copy(source, target)))
        while not list(tmp_path.glob(".target*")):  # it is on its way back
            await asyncio.sleep(0.005)
        agent_of(process_of(engine)).kill()
        with pytest.raises(EngineDied):
            await copy
        assert [file.name for file in tmp_path.glob("*target*")] == []
        await engine.call(Copy(source, target))
        assert target.stat().st_size == source.stat().st_size


async def test_who_has_the_fronts_disk_is_brought_nothing(ray_cluster: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"here")
    async with (
        places(ray_cluster, front_folders=(str(tmp_path),)) as own,
        running(own) as (engine,),
    ):
        assert await engine.call(Copy(source, target)) == str(source)
        assert target.read_bytes() == b"here"
