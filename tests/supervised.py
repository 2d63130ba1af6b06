"""A trainer that is started again whenever it ends, as an init system does, on the same port."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import psutil

from tests.ray_cluster import engines_behind
from tests.servers import arguments
from tests.warm import children, started

LIMIT_S = 60.0


Environment = Mapping[str, str]


def dying_at(point: str) -> Environment:
    """Has a process end at a point; see mint_core.fault_points."""
    return {"MINT_FAULT_POINT": point}


class Supervised:
    """`environments` are what the first starts have in theirs beside the usual, one each."""

    def __init__(
        self,
        module: str,
        flags: dict[str, object],
        folder: Path,
        environments: Sequence[Environment] = (),
    ) -> None:
        self._held = _held_port()
        self.address = f"127.0.0.1:{self._held.getsockname()[1]}"
        self.log = folder / "log"
        self.starts = 0
        self.exits: list[int] = []
        self._command = [
            sys.executable,
            "-m",
            module,
            *arguments({**flags, "address": self.address, "metrics_address": ""}),
        ]
        self._environments = list(environments)
        self._on_ray = flags.get("engines_on") == "ray"
        self._stopping = False
        self._may_start = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._keep)
        self._thread.start()

    def kill(self) -> None:
        """Kills the front, and so its engine, and waits until another is started."""
        self._end(signal.SIGKILL)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Kills the front, and so its engine, and starts no other meanwhile."""
        with self._may_start:
            starts, engines = self.starts, self.engines()
            assert self._process is not None
            self._process.kill()
            self._process.wait()
            psutil.wait_procs(engines, LIMIT_S)
            yield
        self.await_start(starts + 1)

    def restart(self) -> None:
        """Has the front end by itself, and waits until another is started."""
        self._end(signal.SIGTERM)

    def kill_engine(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the engine that is up or starts, if there is one."""
        for engine in self.engines():
            with suppress(psutil.NoSuchProcess):
                engine.send_signal(number)

    def engines(self) -> list[psutil.Process]:
        """The engine that is up or starts, if there is one; on Ray, the driver too."""
        assert self._process is not None
        try:
            front = psutil.Process(self._process.pid)
            # A child that is still a copy of the front would stop it if it were stopped.
            found = [each for each in children(front.pid) if each.cmdline() != front.cmdline()]
            return [*found, *(engines_behind(front) if self._on_ray else ())]
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            return []

    def start_next_with(self, environment: Environment) -> None:
        """Has the next start have more in its environment."""
        self._environments.append(environment)

    @property
    def pid(self) -> int:
        """Of the front that was started last."""
        assert self._process is not None
        return self._process.pid

    def await_start(self, number: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.starts >= number, LIMIT_S), self.log_text()

    def log_text(self) -> str:
        return self.log.read_text()

    def stop(self) -> None:
        self._stopping = True
        if self._process is not None:
            self._process.terminate()
        self._thread.join(LIMIT_S)
        self._held.close()

    def _end(self, number: int) -> None:
        starts, process = self.starts, self._process
        assert process is not None
        process.send_signal(number)
        self.await_start(starts + 1)

    def _keep(self) -> None:
        with self.log.open("ab") as log:
            while not self._stopping:
                more = self._environments.pop(0) if self._environments else {}
                with self._may_start, self._changed:
                    self._process = started(self._command, stderr=log, env={**os.environ, **more})
                    self.starts += 1
                    self._changed.notify_all()
                self.exits.append(self._process.wait())


@contextmanager
def supervised(
    module: str, folder: Path, environments: Sequence[Environment] = (), **flags: object
) -> Iterator[Supervised]:
    """Runs a trainer's module with flags; what it wrote is in `folder`/log."""
    flags.setdefault("store", folder / "store")
    service = Supervised(module, flags, folder, environments)
    try:
        yield service
    finally:
        service.stop()


def summing(
    folder: Path, *environments: Environment, **flags: object
) -> AbstractContextManager[Supervised]:
    """A trainer on the engine of sums: see tests.engines.rows."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    return supervised("tests.engines.rows_service", folder, environments, base_model=model, **flags)


def _held_port() -> socket.socket:
    """A socket whose port is nobody else's, nor another connection's own, while no server runs."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for the server to have it too
    held.bind(("127.0.0.1", 0))
    return held
