"""`python -m mint_core.engine_host.on_ray.driver FD OPTIONS`: has Ray run a front's engines, and
stands between. The descriptor is of a socket on which the front asks; see `host.py` beside this.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # engines' lines are all told, and read at once
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mint_core.addresses import host_and_port
from mint_core.engine_host.host import CannotLaunch, End
from mint_core.engine_host.on_ray.agent import (
    EngineAgent,
    Order,
    Started,
    places,
    this_machine,
    version,
)
from mint_core.engine_host.on_ray.certificates import Authority, name_of
from mint_core.engine_host.on_ray.frames import PIECE_BYTES, Link, PeerGone
from mint_core.engine_host.on_ray.options import RayOptions
from mint_core.engine_host.on_ray.relay import Relay
from mint_core.engine_host.pipe import die_with_the_front
from mint_core.fault_points import inherited

logger = logging.getLogger(__name__)

MEET_LIMIT_S = 60.0  # for an agent that runs to come here
REACH_LIMIT_S = 10.0  # for the cluster to take a connection
KILL_LIMIT_S = 5.0  # for an agent to say that its engine has ended
TELL_ROOM_S = 10.0
PLACINGS = 3  # of an actor that is lost before it runs

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(slots=True)
class _Life:
    """An engine that is expected, or there."""

    met: "asyncio.Future[Streams]" = field(default_factory=asyncio.Future)  # its agent
    asked: "asyncio.Future[Streams]" = field(default_factory=asyncio.Future)  # the front's pipe
    relay: Relay | None = None


class Driver:
    def __init__(self, options: RayOptions) -> None:
        self._options = options
        self._authority = Authority()
        self._lives: dict[str, _Life] = {}
        self._address = ("", 0)
        self._agent = ray.remote(EngineAgent)
        # One for the engines that there are at start, so that Ray spreads or packs them; those that
        # come later have one each. Its bundles are placed anew when a node is lost.
        self._shared: PlacementGroup | None = None
        self._single: dict[int, PlacementGroup] = {}

    async def serve(self, listening: socket.socket) -> None:
        host, port = ray.util.get_node_ip_address(), 0
        if self._options.listen:
            host, port = host_and_port(self._options.listen, "ray_listen")
        agents = await asyncio.start_server(
            self._meet, host, port, ssl=self._authority.context(), limit=2 * PIECE_BYTES
        )
        self._address = host, agents.sockets[0].getsockname()[1]
        logger.info("engines on Ray reach this service at %s port %d", *self._address)
        front = await asyncio.start_unix_server(self._ask, sock=listening, limit=2 * PIECE_BYTES)
        await front.serve_forever()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """An agent has come, and shown a certificate of this driver's, which counts once."""
        life = self._lives.get(name_of(writer.get_extra_info("ssl_object")))
        if life is None or life.met.done():
            writer.transport.abort()
        else:
            life.met.set_result((reader, writer))

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = json.loads(await reader.readline())
            match asked:
                case {"pipe": name}:
                    self._lives[name].asked.set_result((reader, writer))
                    return
                case {"launch": module, "place": place}:
                    await self._launch(module, place, reader, writer)
                case {"remove": place} if place in self._single:
                    remove_placement_group(self._single.pop(place))
        except (OSError, KeyError, ValueError):
            logger.exception("the front has asked what its driver does not understand")
        writer.close()

    async def _launch(
        self, module: str, place: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Runs an engine. The front's end of the stream is its word to end it."""
        life, name = _Life(), f"engine-{uuid4().hex}"
        self._lives[name] = life

        def tell(**told: Any) -> None:
            writer.write(json.dumps({"name": name, **told}).encode() + b"\n")

        living = asyncio.create_task(self._live(life, name, module, place, tell))
        unwanted = asyncio.create_task(reader.read())
        await asyncio.wait({living, unwanted}, return_when=asyncio.FIRST_COMPLETED)
        if not living.done() and life.relay:
            with contextlib.suppress(PeerGone, TimeoutError):
                await asyncio.wait_for(life.relay.kill(), KILL_LIMIT_S)
                await asyncio.wait({living}, timeout=KILL_LIMIT_S)
        for task in (living, unwanted):
            task.cancel()
        await asyncio.wait({living, unwanted})
        del self._lives[name]
        end = End("the engine was killed", killed=True)
        if not living.cancelled():
            end = living.result()
        tell(end=end)

    async def _live(self, life: _Life, name: str, module: str, place: int, tell: Any) -> End:
        actor, link = None, None
        try:
            actor, asked = await self._placed(place)
            started = await self._start(actor, asked, life, name, module)
            link = Link(*life.met.result())
            tell(pid=started.pid, shared=started.shared)
            life.relay = Relay(*await life.asked, link, started.free_bytes)
            return await life.relay.run()
        except CannotLaunch as error:
            return error.end
        except PeerGone:
            return End("the engine's actor or its machine was lost", killed=True)
        except Exception:
            logger.exception("an engine on Ray cannot be served")
            return End("the engine's driver failed at it", killed=False)
        finally:
            if life.asked.done() and not life.asked.cancelled():
                life.asked.result()[1].close()
            if actor is not None:
                ray.kill(actor)  # what an agent began ends with it
            if link is not None:  # it sees to it by itself where Ray does not reach it
                asyncio.get_running_loop().call_later(KILL_LIMIT_S, link.close)

    async def _placed(self, place: int) -> tuple[Any, bytes]:
        """An actor that runs, and its request for a certificate. Ray takes a while to see that a
        node is lost, and until then has actors wait for it.
        """
        for _ in range(PLACINGS):
            actor = self._actor(place)
            try:
                return actor, await self._told(actor.request.remote(version()))
            except RayTaskError as error:
                ray.kill(actor)
                raise CannotLaunch(f"the engine's machine {error.cause}") from error
            except RayActorError as error:
                logger.warning("%s", error)
            except BaseException:
                ray.kill(actor)
                raise
        raise CannotLaunch("the engine's actor was lost at its start", killed=True)

    async def _start(
        self, actor: Any, asked: bytes, life: _Life, name: str, module: str
    ) -> Started:
        try:
            order = Order(
                self._address,
                self._authority.certificate,
                self._authority.sign(asked, name),
                module,
                os.getcwd(),
                self._options.folder,
                this_machine(),
                places(list(self._options.front_folders)),
                inherited(),
            )
            started = Started(*await actor.start.remote(order))
            await asyncio.wait_for(asyncio.shield(life.met), MEET_LIMIT_S)
        except RayTaskError as error:
            raise CannotLaunch(f"the engine's machine {error.cause}") from error
        except (RayActorError, TimeoutError) as error:
            logger.warning("%s", error)
            raise CannotLaunch("the engine's actor was lost at its start", killed=True) from error
        except RayError as error:
            raise CannotLaunch(f"Ray cannot run an engine: {error}") from error
        return started

    async def _told(self, answer: Any) -> bytes:
        """Says meanwhile for what it waits."""

        async def say() -> None:
            await asyncio.sleep(TELL_ROOM_S)
            logger.warning("Ray has no room yet for an engine of %s", self._options.bundle)

        saying = asyncio.create_task(say())
        try:
            asked: bytes = await answer
        finally:
            saying.cancel()
        return asked

    def _actor(self, place: int) -> Any:
        count = self._options.count
        if place < count:
            if self._shared is None:
                self._shared = self._group(count)
            group, index = self._shared, place
        else:
            if place not in self._single:
                self._single[place] = self._group(1)
            group, index = self._single[place], 0
        return self._agent.options(
            num_cpus=self._options.cpus,
            num_gpus=self._options.gpus,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
        ).remote()

    def _group(self, count: int) -> PlacementGroup:
        strategy = self._options.strategy.upper()
        return placement_group([self._options.bundle] * count, strategy=strategy)


async def refuse(listening: socket.socket, why: str) -> None:
    """Tells the first who asks why there is no Ray, and ends."""
    told = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(json.dumps({"name": "", "end": End(why, killed=False)}).encode() + b"\n")
        await writer.drain()
        writer.close()
        told.set()

    async with await asyncio.start_unix_server(answer, sock=listening):
        await told.wait()


def main() -> None:
    die_with_the_front()
    listening = socket.socket(fileno=int(sys.argv[1]))
    options = RayOptions(**json.loads(sys.argv[2]))
    logging.basicConfig(
        level=options.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    serving: Coroutine[Any, Any, None]
    try:
        if options.address != "auto":  # Ray itself would try for minutes
            address = host_and_port(options.address, "ray_address")
            socket.create_connection(address, REACH_LIMIT_S).close()
        ray.init(address=options.address, logging_level=logging.WARNING)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        serving = refuse(listening, f"`ray_address` {options.address} cannot be joined: {first}")
    else:
        serving = Driver(options).serve(listening)
    asyncio.run(serving)


if __name__ == "__main__":
    main()
