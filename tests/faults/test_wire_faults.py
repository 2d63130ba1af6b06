"""Two samplers get adapters from a trainer, and everything between goes wrong as a seed draws it:
connections are cut, answers lie, the trainer is killed, names are published anew and deleted
meanwhile, samplers end. Whatever they serve is what the trainer has published, and goes on.
WIRE_SEEDS=N plays so many seeds.
"""

import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from checkpoint_store import SAMPLER_WEIGHTS, CheckpointStore
from checkpoint_store.errors import CheckpointDamaged
from mint_core.errors import CheckpointNotFound, MintError
from mint_core.lora.spec import AdapterArrays
from mint_core.lora.targets import initial_arrays
from mintrpc.v1 import checkpoint_pb2, checkpoint_pb2_grpc
from sampler_service.wire_store.access import TrainerAccess
from sampler_service.wire_store.errors import StoreRefused, StoreUnreachable
from sampler_service.wire_store.trainer import Trainer
from sampler_service.wire_store.wire_store import WireStore
from tests.checkpoint_files import publish_checkpoint, same
from tests.engines_in_process import random_arrays
from tests.harness.proxy import Proxy
from tests.integration.test_wire_downloads import SHAPE, SPEC
from tests.keys import make_key
from tests.resending import EAGER, insisting
from tests.supervised import Supervised, summing

SEEDS = range(int(os.environ.get("WIRE_SEEDS", "1")))
ACTIONS = 120
NAMES = tuple(f"mint://run/sampler_weights/{name}" for name in "abc")
SAMPLERS = 2
AT_A_TIME = 4  # calls of both samplers
PIECE_DELAY_S = 0.002  # so that cuts find downloads under way
LIMIT_S = 60.0
FALSE_DIGEST = "0" * 64
WEIGHTS = {
    "ask": 12,
    "publish": 3,
    "delete": 1,
    "lie": 5,
    "cut": 2,
    "leave": 2,
    "kill": 1,
    "restart_sampler": 1,
}
GONE = None

Piece = checkpoint_pb2.DownloadCheckpointResponse
Lie = Callable[[Any], None]
Act = Callable[[], None]


def _flip(piece: Piece) -> None:
    middle = len(piece.data) // 2
    piece.data = piece.data[:middle] + bytes([piece.data[middle] ^ 1]) + piece.data[middle + 1 :]


def _halve(piece: Piece) -> None:
    piece.data = piece.data[: len(piece.data) // 2]


def _set(name: str, change: Callable[[Any], Any]) -> Lie:
    return lambda message: setattr(message, name, change(getattr(message, name)))


# What becomes of the answer of a lookup, and of the first piece of a download.
OF_LOOKUPS: dict[str, Lie] = {
    "digest": lambda told: _set("sha256", lambda _: FALSE_DIGEST)(told.files[-1]),
    "smaller": lambda told: _set("size_bytes", lambda size: size // 2)(told.files[-1]),
    "larger": lambda told: _set("size_bytes", lambda size: size + 7)(told.files[-1]),
    "other_name": _set("revision_path", lambda path: path.replace("weights/", "weights/x")),
    "nonsense": _set("revision_path", lambda path: path + "!"),
}
OF_PIECES: dict[str, Lie] = {
    "flipped": _flip,
    "short": _halve,  # and nothing behind it
    "longer": _set("data", lambda data: data + b"x"),
    "shifted": _set("offset_bytes", lambda offset: offset + 1),
    "other_file": lambda piece: _set("sha256", lambda _: FALSE_DIGEST)(piece.file),
}


class Between(checkpoint_pb2_grpc.CheckpointServiceServicer):
    """Passes on what a trainer says, and lies, or leaves, when it is told to."""

    def __init__(self, trainer: str) -> None:
        self._channel = grpc.insecure_channel(trainer, EAGER)
        self._trainer = checkpoint_pb2_grpc.CheckpointServiceStub(self._channel)
        self._server = grpc.server(ThreadPoolExecutor(2 * AT_A_TIME))
        checkpoint_pb2_grpc.add_CheckpointServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        self._lock = threading.Lock()
        self.lies: list[str] = []  # that are to be told next
        self.told: Counter[str] = Counter()  # lies
        self.leaves = 0  # downloads that are to be left in their midst

    def await_trainer(self) -> None:
        request, health = health_pb2.HealthCheckRequest(), health_pb2_grpc.HealthStub(self._channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        while insisting(lambda: health.Check(request, timeout=LIMIT_S)).status != serving:
            time.sleep(0.02)  # nothing tells of it

    def close(self) -> None:
        self._server.stop(None).wait()
        self._channel.close()

    def GetCheckpoint(self, request: Any, context: Any) -> Any:
        try:
            answer = self._trainer.GetCheckpoint(request, **_options(context))
        except grpc.RpcError as error:
            _pass_on(error, context)
        self._change(OF_LOOKUPS, answer.checkpoint)
        return answer

    def DownloadCheckpoint(self, request: Any, context: Any) -> Iterator[Piece]:
        download = self._trainer.DownloadCheckpoint(request, **_options(context))
        try:
            for number, piece in enumerate(download):
                lie = "" if number else self._change(OF_PIECES, piece)
                yield piece
                if lie == "short":
                    return
                if self.leaves:
                    self.leaves -= 1
                    context.abort(grpc.StatusCode.UNAVAILABLE, "left")
        except grpc.RpcError as error:
            _pass_on(error, context)

    def _change(self, kinds: Mapping[str, Lie], message: Any) -> str:
        """Tells a lie of these, if there is one to be told."""
        with self._lock:
            lie = next((each for each in self.lies if each in kinds), "")
            if lie:
                self.lies.remove(lie)
                self.told[lie] += 1
        if lie:
            kinds[lie](message)
        return lie


def _options(context: Any) -> dict[str, Any]:
    key = [each for each in context.invocation_metadata() if each[0] == "authorization"]
    return {"metadata": key, "timeout": LIMIT_S}


def _pass_on(error: Any, context: Any) -> NoReturn:
    context.set_trailing_metadata(
        [each for each in error.trailing_metadata() or () if each[0] == "grpc-status-details-bin"]
    )
    context.abort(error.code(), error.details())
    raise AssertionError


@cache
def arrays(number: int) -> AdapterArrays:
    """Of the revision that was published as that number."""
    return random_arrays(initial_arrays(SPEC, {"big": SHAPE}), number)


@dataclass
class Meanings:
    """What each path means, one after the other: a publication's number, or that it is gone."""

    of: dict[str, list[int | None]] = field(default_factory=dict)
    _settled: Counter[str] = field(default_factory=Counter)  # how many of them are no more

    @contextmanager
    def become(self, meaning: int | None, *paths: str) -> Iterator[None]:
        for path in paths:
            self.of.setdefault(path, [GONE]).append(meaning)
        yield
        self._settled.update(dict.fromkeys(paths, 1))

    def from_now(self, path: str) -> Callable[[], Sequence[int | None]]:
        """What it has meant since, whenever that is asked."""
        first = self._settled[path]
        return lambda: self.of[path][first:]

    def last(self, path: str) -> int | None:
        return self.of[path][-1]


@dataclass
class Play:
    folder: Path
    trainer: Supervised
    between: Between
    proxy: Proxy
    random: Random
    samplers: list[WireStore] = field(default_factory=list)
    meanings: Meanings = field(default_factory=Meanings)
    cuts: int = 0  # of the way to the trainer, by whatever
    away: int = 0  # for how many reasons the trainer is away now
    done: Counter[str] = field(default_factory=Counter)
    came_to: Counter[str] = field(default_factory=Counter)  # of what was asked
    problems: list[str] = field(default_factory=list)

    def run(self) -> None:
        for name in NAMES:
            self.publish(name)
        self.samplers = [self.sampler(number) for number in range(SAMPLERS)]
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            under_way: set[Future[None]] = set()
            for _ in range(ACTIONS):
                (kind,) = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))
                self.done[kind] += 1
                under_way |= {pool.submit(act) for act in getattr(self, f"_{kind}")()}
                if len(under_way) > AT_A_TIME:
                    ended, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    for each in ended:
                        each.result()
        self.between.lies.clear()
        self.between.leaves = 0
        self.samplers.append(self.sampler(0))
        for number, sampler in enumerate(self.samplers):
            for path in self.meanings.of:
                self.ask(number, path)
            sampler.interrupt()

    def sampler(self, number: int) -> WireStore:
        """It finds what another of its number has left in the folder."""
        folder = self.folder / f"sampler-{number}"
        access = TrainerAccess(address=f"http://{self.proxy.address}", key=self.folder / "key")
        return WireStore(Trainer(access), folder)

    def publish(self, name: str) -> None:
        number = 1 + sum("@" in path for path in self.meanings.of)
        with self.meanings.become(number, name):
            made = publish_checkpoint(
                CheckpointStore(self.folder / "store"),
                training_run_id="run",
                kind=SAMPLER_WEIGHTS,
                name=name.rpartition("/")[2],
                tenant="ada",
                base_model="m",
                base_fingerprint="f",
                spec=SPEC,
                step=number,
                weights=arrays(number),
            )
        self.meanings.of[str(made.revision_path)] = [number]

    def ask(self, number: int, path: str) -> None:
        """Has a sampler serve what a path means."""
        lies, cuts, away = self.between.told.total(), self.cuts, self.away
        store, meant = self.samplers[number], self.meanings.from_now(path)
        try:
            found = store.find(path, tenant="ada", kind=SAMPLER_WEIGHTS)
            store.verify(found)
            weights, served = found.weights(), found.manifest.step
        except MintError as error:
            lied = self.between.told.total() > lies
            allowed = {
                CheckpointNotFound: GONE in meant(),
                StoreUnreachable: away > 0 or self.cuts > cuts,
                CheckpointDamaged: lied,
                StoreRefused: lied,
            }
            self.came_to[type(error).__name__] += 1
            if not allowed.get(type(error)):
                self.problems.append(f"{path}: {error!r}")
            return
        self.came_to["served"] += 1
        if served not in meant() or not same(weights, arrays(served)):
            self.problems.append(f"{path}: publication {served}, and it meant {meant()}")

    def _ask(self) -> Iterator[Act]:
        number = self.random.randrange(SAMPLERS)
        path = self.random.choice([*NAMES, *self.meanings.of])
        yield lambda: self.ask(number, path)

    def _publish(self) -> Iterator[Act]:
        self.publish(self.random.choice(NAMES))
        yield from ()

    def _delete(self) -> Iterator[Act]:
        """A name, with all its revisions."""
        name = self.random.choice(NAMES)
        of_name = [path for path in self.meanings.of if path.partition("@")[0] == name]
        if self.meanings.last(name) is not GONE:
            with self.meanings.become(GONE, *of_name):
                CheckpointStore(self.folder / "store").delete(name, tenant="ada")
        yield from ()

    def _lie(self) -> Iterator[Act]:
        self.between.lies.append(self.random.choice([*OF_LOOKUPS, *OF_PIECES]))
        yield from ()

    def _cut(self) -> Iterator[Act]:
        self.cuts += 1
        self.proxy.cut()
        yield from ()

    def _leave(self) -> Iterator[Act]:
        self.between.leaves += 1
        yield from ()

    def _kill(self) -> Iterator[Act]:
        self.away += 1
        self.cuts += 1
        self.trainer.kill()
        yield self._come_back

    def _come_back(self) -> None:
        self.between.await_trainer()
        self.away -= 1

    def _restart_sampler(self) -> Iterator[Act]:
        number = self.random.randrange(SAMPLERS)
        before, self.samplers[number] = self.samplers[number], self.sampler(number)
        self.cuts += 1
        before.interrupt()
        yield from ()


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_wrong_is_served_and_all_goes_on(
    seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    make_key("ada", tmp_path / "keys")
    key = make_key("sampler", tmp_path / "keys", scopes=frozenset({"fetch"}))
    (tmp_path / "key").write_text(key)
    with summing(tmp_path, keys=tmp_path / "keys") as trainer:
        between = Between(trainer.address)
        proxy = Proxy(between.address)
        proxy.delay_s = PIECE_DELAY_S
        try:
            between.await_trainer()
            play = Play(tmp_path, trainer, between, proxy, Random(seed))
            play.run()
        finally:
            proxy.close()
            between.close()
    sys.stdout.write(f"seed={seed} {dict(play.done)} {dict(play.came_to)} {dict(between.told)}\n")
    assert play.problems == []
    assert play.came_to["served"] > len(play.meanings.of)
    assert between.told.total()
    assert "download goes on" in caplog.text
