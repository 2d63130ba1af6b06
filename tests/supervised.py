"""A trainer that is started again whenever it ends, as an init system does, on the same port."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.servers import arguments

LIMIT_S = 60.0


class Supervised:
    """`faults` are those of the first starts, one each; see mint_core.fault_points."""

    def __init__(
        self, module: str, flags: dict[str, object], folder: Path, faults: Sequence[str] = ()
    ) -> None:
        self.address = f"127.0.0.1:{_free_port()}"
        self.log = folder / "log"
        self.starts = 0
        self.exits: list[int] = []
        self._command = [
            sys.executable,
            "-m",
            module,
            *arguments({**flags, "address": self.address, "metrics_address": ""}),
        ]
        self._faults = list(faults)
        self._stopping = False
        self._process: subprocess.Popen[bytes] | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._keep)
        self._thread.start()

    def kill(self) -> None:
        """Kills the front, and so its engine, and waits until another is started."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Has the front end by itself, and waits until another is started."""
        self._end(signal.SIGTERM)

    def kill_engine(self) -> None:
        """Kills the engine that is up or starts, if there is one."""
        assert self._process is not None
        for engine in psutil.Process(self._process.pid).children():
            engine.kill()

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

    def _end(self, number: int) -> None:
        starts, process = self.starts, self._process
        assert process is not None
        process.send_signal(number)
        self.await_start(starts + 1)

    def _keep(self) -> None:
        with self.log.open("ab") as log:
            while not self._stopping:
                fault = self._faults.pop(0) if self._faults else ""
                environment = {**os.environ, "MINT_FAULT_POINT": fault}
                with self._changed:
                    self._process = subprocess.Popen(self._command, stderr=log, env=environment)
                    self.starts += 1
                    self._changed.notify_all()
                self.exits.append(self._process.wait())


@contextmanager
def supervised(
    module: str, folder: Path, faults: Sequence[str] = (), **flags: object
) -> Iterator[Supervised]:
    """Runs a trainer's module with flags; what it wrote is in `folder`/log."""
    flags.setdefault("store", folder / "store")
    service = Supervised(module, flags, folder, faults)
    try:
        yield service
    finally:
        service.stop()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
