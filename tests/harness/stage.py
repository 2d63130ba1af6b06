"""Trainer, sampler, a proxy before each, and users: real processes on real sockets."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mint
from checkpoint_store import CheckpointStore
from mint_core.hosting.access import make_key
from tests.checkpoint_files import moments
from tests.harness import history
from tests.harness.proxy import Proxy
from tests.harness.user import script
from tests.supervised import Supervised, supervised

LOOK_S = 0.02
SILENCE_LIMIT_S = 600.0  # without an answer to anybody
MOST_FAILURES = 3  # of a user's process by itself


@dataclass
class UserProcess:
    """One user, started again whenever it is killed."""

    number: int
    steps: int
    file: Path
    environment: dict[str, str]
    lives: int = 0
    kills: int = 0
    failures: int = 0
    _process: "subprocess.Popen[bytes] | None" = None

    def look(self) -> bool:
        """Starts what is to be started; whether the script has ended."""
        if self._process is not None:
            status = self._process.poll()
            if status is None:
                return False
            if status == 0 or self.failures >= MOST_FAILURES:
                return True
            self.failures += status != -signal.SIGKILL
        words = (self.number, self.steps, self.lives, self.file)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.user", *map(str, words)], env=self.environment
        )
        self.lives += 1
        return False

    @property
    def answered(self) -> int:
        return history.answered(self.file)

    @property
    def progress(self) -> history.Progress:
        return history.progress(self.file)

    @property
    def ended(self) -> bool:
        """Whether the script has come to its end."""
        return self._process is not None and self._process.poll() == 0

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
            self.kills += 1

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@dataclass
class Stage:
    folder: Path
    trainer: Supervised
    sampler: Supervised
    proxies: tuple[Proxy, Proxy]
    keys: list[str]  # of the users, and of one more tenant
    users: list[UserProcess] = field(default_factory=list)
    stuck: bool = False

    def answered(self) -> int:
        return sum(user.answered for user in self.users)

    def engine_deaths(self) -> int:
        """Of engines that died and not their front."""
        logs = self.trainer.log_text() + self.sampler.log_text()
        return logs.count("; starting another in ")

    def kills(self) -> int:
        """Of any process, by whatever of the harness."""
        fronts = (*self.trainer.exits, *self.sampler.exits)
        clients = sum(user.kills for user in self.users)
        return fronts.count(-signal.SIGKILL) + self.engine_deaths() + clients

    def client(self, number: int) -> mint.ServiceClient:
        """Beside the proxies, with a user's key."""
        return mint.ServiceClient(base_url=self.trainer.address, api_key=self.keys[number])

    def start_users(self, count: int, steps: int) -> None:
        for number in range(count):
            environment = {
                **os.environ,
                "MINT_BASE_URL": self.proxies[0].address,
                "MINT_SAMPLER_URL": self.proxies[1].address,
                "MINT_API_KEY": self.keys[number],
            }
            file = self.folder / f"history-{number}"
            self.users.append(UserProcess(number, steps, file, environment))

    def end_users(self) -> None:
        for user in self.users:
            user.end()

    def running(self) -> Iterator[None]:
        """Goes on until all scripts have ended, and lets its caller act now and then. Ends early,
        with `stuck` set, when nobody has been answered for long.
        """
        answered, deadline = 0, time.monotonic() + SILENCE_LIMIT_S
        while [user for user in self.users if not user.look()]:
            if self.answered() > answered:
                answered, deadline = self.answered(), time.monotonic() + SILENCE_LIMIT_S
            if time.monotonic() > deadline:
                self.stuck = True
                return
            yield
            time.sleep(LOOK_S)  # nothing tells of a process's end and of its answers alike

    def history(self) -> list[dict[str, Any]]:
        """What the users did, and how their runs were found in the end."""
        events = []
        self.end_users()
        for user in self.users:
            events += list(history.read(user.file))
            events.append(self._final(user))
        return events

    def _final(self, user: UserProcess) -> dict[str, Any]:
        with self.client(user.number) as service:
            run = service.list_training_runs().training_runs[0]
        final = {
            "user": user.number,
            "event": "final",
            "run": run.training_run_id,
            "next": run.next_sequence,
            "step": run.step,
            "weights": "",
        }
        path = f"mint://{run.training_run_id}/weights/at-{len(script(user.number, user.steps))}"
        try:
            opened = CheckpointStore(self.folder / "store").open(path, tenant=tenant(user.number))
        except Exception as error:
            return final | {"weights": f"{type(error).__name__}"}
        parts = (opened.weights(), *moments(opened))
        digest = hashlib.sha256()
        for part in parts:
            for name, array in sorted(part.items()):
                digest.update(name.encode() + array.tobytes())
        return final | {"weights": digest.hexdigest()}


def tenant(number: int) -> str:
    return f"tenant-{number}"


@contextmanager
def staged(folder: Path, model: Path, users: int, state: Path) -> Iterator[Stage]:
    """Everything but the users' processes."""
    with ExitStack() as stack:
        keys = [make_key(tenant(number), folder / "keys") for number in range(users + 1)]
        flags: dict[str, object] = {
            "base_model": model,
            "base_model_name": "tiny",
            "device": "cpu",
            "threads": 1,
            "store": folder / "store",
            "keys": folder / "keys",
        }
        services = []
        for name, module, more in (
            ("trainer", "tests.engines.mortal_service", _TRAINER | {"state": state}),
            ("sampler", "sampler_service", {}),
        ):
            (folder / name).mkdir()
            running = supervised(module, folder / name, (), **flags, **more)
            services.append(stack.enter_context(running))
        proxies = []
        for service in services:
            proxy = Proxy(service.address)
            stack.callback(proxy.close)
            proxies.append(proxy)
        trainer, sampler = services
        stage = Stage(folder, trainer, sampler, (proxies[0], proxies[1]), keys)
        stack.callback(stage.end_users)
        yield stage


_TRAINER: dict[str, object] = {"max_batch_tokens": 256, "snapshot_s": 0.5, "drain_s": 4}
