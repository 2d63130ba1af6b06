"""Trainer and sampler, of several engines each, proxies before both and between them, and users:
real processes on real sockets.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil

import mint
from checkpoint_store import CheckpointStore
from mint_core.errors import CheckpointNotFound
from mintrpc.v1 import admin_pb2, admin_pb2_grpc
from tests.checkpoint_files import moments
from tests.engines.bad_store import BadStore
from tests.harness import history
from tests.harness.proxy import Proxy
from tests.harness.user import NOBODY_THERE, saved_names
from tests.keys import make_key
from tests.ray_cluster import add_node, kill_node_of
from tests.supervised import Supervised, supervised

LOOK_S = 0.02
ADMIN_LIMIT_S = 60.0
SILENCE_LIMIT_S = 600.0  # without an answer to anybody
MOST_FAILURES = 3  # of a user's process by itself


@dataclass(frozen=True, slots=True)
class Hosting:
    """Where engines run: flags that say so, and the cluster of Ray if it is one."""

    flags: Mapping[str, object] = field(default_factory=dict)
    cluster: Any = None


BESIDE = Hosting()  # their fronts


@dataclass
class UserProcess:
    """One user, started again whenever it is killed."""

    number: int
    steps: int
    file: Path
    environment: dict[str, str]
    timeline: int = 0
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
            if self.settled:
                return self.timeline == 0  # else it goes on where the timelines have parted
            self.failures += status not in (-signal.SIGKILL, NOBODY_THERE)
        words = (self.number, self.steps, self.lives, self.timeline, self.file)
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

    @property
    def settled(self) -> bool:
        """Whether nothing more will come, by its end or by failures."""
        failed = self.failures >= MOST_FAILURES and self._process is not None
        return self.ended or (failed and self._process.poll() is not None)

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
            self.kills += 1

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def turn_to(self, timeline: int) -> None:
        """Has the next process, also one whose script has ended, be of that timeline."""
        self.kill()
        self._process = None
        self.timeline = timeline


@dataclass
class Stage:
    folder: Path
    state: Path
    trainer: Supervised
    sampler: Supervised
    proxies: list[Proxy]  # before trainer and sampler, and between them
    keys: list[str]  # of the users, and of one more tenant
    bad_store: BadStore
    admin_key: str
    cluster: Any
    users: list[UserProcess] = field(default_factory=list)
    abandoned: list[dict[str, Any]] = field(default_factory=list)  # events
    stuck: bool = False
    nodes_lost: int = 0

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.bad_store.store)

    def answered(self) -> int:
        return sum(user.answered for user in self.users)

    @property
    def settled(self) -> bool:
        """Whether nothing more will come from any user."""
        return all(user.settled for user in self.users)

    def kills(self) -> Counter[str]:
        """Of any process, by whatever of the harness; an engine's only where its front lived on."""
        found = Counter(users=sum(user.kills for user in self.users), nodes=self.nodes_lost)
        for front, engines in (("trainer", "groups"), ("sampler", "replicas")):
            service: Supervised = getattr(self, front)
            found[front] = service.exits.count(-signal.SIGKILL)
            found[engines] = service.log_text().count("; starting another in ")
        return +found

    def renew(self, service: Supervised, kind: str) -> None:
        """Adds a group to the trainer's, or a replica to the sampler's, and drains the oldest."""
        header = (("authorization", f"Bearer {self.admin_key}"),)
        with grpc.insecure_channel(service.address) as channel:
            admin = admin_pb2_grpc.AdminServiceStub(channel)

            def call(method: str, **fields: str) -> Any:
                request = getattr(admin_pb2, f"{method}Request")(**fields)
                return getattr(admin, method)(request, metadata=header, timeout=ADMIN_LIMIT_S)

            call(f"Add{kind}")
            ((_, there),) = call(f"List{kind}s").ListFields()
            oldest = next(each for each in there if each.state != each.STATE_DRAINING)
            call(f"Drain{kind}", name=oldest.name)

    def lose_node_of(self, engine: psutil.Process) -> None:
        """With whatever else runs there; another comes to the cluster. On the main thread, as Ray
        starts nodes nowhere else.
        """
        kill_node_of(self.cluster, engine)
        self.nodes_lost += 1
        add_node(self.cluster)

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

    def turn_to(self, timeline: int, copy: Path) -> None:
        """Has users go on otherwise, from what the state is now, of which a copy is made."""
        with self.trainer.away():
            for user in self.users:
                user.turn_to(timeline)
            shutil.copytree(self.state, copy)

    def turn_back(self, copy: Path) -> None:
        """Puts a copy of the state in its place, under the same store."""
        with self.trainer.away():
            for user in self.users:
                run = self._run_of(user)
                about = {"user": user.number, "event": "abandoned", "run": run}
                self.abandoned.append(about | {"saved": self._saved(user, run)})
                user.turn_to(0)
            shutil.rmtree(self.state)
            shutil.copytree(copy, self.state)

    def has_parted(self, timeline: int) -> bool:
        """Whether under some name lies what that timeline alone has made."""
        return any(history.has_parted(user.file, timeline) for user in self.users)

    def history(self) -> list[dict[str, Any]]:
        """What the users did, and how their runs were found in the end."""
        events = []
        self.end_users()
        for user in self.users:
            events += list(history.read(user.file))
        events += self.abandoned
        return events + [self._final(user) for user in self.users]

    def _run_of(self, user: UserProcess) -> str:
        """As the user has opened it last."""
        opened = [event for event in history.read(user.file) if event["event"] == "opened"]
        return str(opened[-1]["run"]) if opened else ""

    def _final(self, user: UserProcess) -> dict[str, Any]:
        with self.client(user.number) as service:
            run = service.list_training_runs().training_runs[0]
        saved = self._saved(user, run.training_run_id)
        return {
            "user": user.number,
            "event": "final",
            "run": run.training_run_id,
            "next": run.next_sequence,
            "step": run.step,
            "weights": saved[saved_names(user.number, user.steps)[-1]],
            "saved": saved,
        }

    def _saved(self, user: UserProcess, run: str) -> dict[str, str]:
        """A digest of what lies under each name that the script saves."""
        names = saved_names(user.number, user.steps) if run else []
        return {name: self._digest(f"mint://{run}/{name}", tenant(user.number)) for name in names}

    def _digest(self, path: str, tenant: str) -> str:
        """Empty if there is none."""
        try:
            opened = self.store.open(path, tenant=tenant)
        except CheckpointNotFound:
            return ""
        parts = opened.weights(), *moments(opened)
        digest = hashlib.sha256()
        for part in parts:
            for name, array in sorted(part.items()):
                digest.update(name.encode() + array.tobytes())
        return digest.hexdigest()


def tenant(number: int) -> str:
    return f"tenant-{number}"


@contextmanager
def staged(
    folder: Path,
    model: Path,
    users: int,
    state: Path,
    *,
    engines: int = 1,
    wire: bool = False,
    hosting: Hosting = BESIDE,
) -> Iterator[Stage]:
    """Everything but the users' processes, with so many engines of each service. With `wire` the
    sampler shares no folder with the trainer.
    """
    with ExitStack() as stack:
        bad_store = BadStore(folder / "store")
        bad_store.folder.mkdir()
        keys = [make_key(tenant(number), folder / "keys") for number in range(users + 1)]
        admin_key = make_key("ops", folder / "keys", scopes=frozenset({"admin"}))
        (folder / "sampler-key").write_text(
            make_key("sampler", folder / "keys", scopes=frozenset({"fetch"}))
        )
        flags: dict[str, object] = {
            "base_model": model,
            "base_model_name": "tiny",
            "device": "cpu",
            "threads": 1,
            "store": folder / "store",
            "keys": folder / "keys",
            **hosting.flags,
        }
        proxies: list[Proxy] = []

        def service(name: str, module: str, **more: object) -> Supervised:
            (folder / name).mkdir()
            running = stack.enter_context(supervised(module, folder / name, **{**flags, **more}))
            proxies.append(before(running))
            return running

        def before(service: Supervised) -> Proxy:
            proxy = Proxy(service.address)
            stack.callback(proxy.close)
            return proxy

        trainer = service(
            "trainer", "tests.engines.mortal_service", **_TRAINER, state=state, groups=engines
        )
        between = [before(trainer)] if wire else []
        apart = _apart(folder, *between) if wire else {}
        sampler = service("sampler", "sampler_service", replicas=engines, **apart)
        proxies += between
        stage = Stage(
            folder=folder,
            state=state,
            trainer=trainer,
            sampler=sampler,
            proxies=proxies,
            keys=keys,
            bad_store=bad_store,
            admin_key=admin_key,
            cluster=hosting.cluster,
        )
        stack.callback(stage.end_users)
        yield stage


def _apart(folder: Path, between: Proxy) -> Mapping[str, object]:
    """Flags of a sampler that gets adapters over the wire."""
    return {
        "store": f"http://{between.address}",
        "store_api_key": folder / "sampler-key",
        "local_folder": folder / "sampler" / "local",
    }


_TRAINER: dict[str, object] = {"max_batch_tokens": 256, "snapshot_s": 0.5, "drain_s": 4}
