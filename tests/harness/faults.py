"""What is done to a stage, drawn from a seed: when so many answers have come, one thing or two."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

import grpc
import psutil

from tests.harness.asides import Aside, Damage, Deletion, Held, Poison
from tests.harness.history import Progress
from tests.harness.stage import LOOK_S, Stage
from tests.ray_cluster import is_on_node
from tests.supervised import Supervised, dying_at

FRONT_POINTS = {
    "journal:before-commit": 60,
    "journal:after-commit": 60,
    "snapshot:before-journal": 4,
    "recovery:restored": 3,
    "store:before-publish": 4,
    "store:after-publish": 4,
}
ENGINE_POINTS = {
    "engine:after-Plan": 12,
    "engine:after-StepRows": 6,
    "engine:after-LoadRow": 1,
    "engine:after-SaveCheckpoint": 2,
    "engine:after-StoreRow": 1,
    "engine:after-WriteRow": 3,
    "engine:after-CreateRow": 3,
    "engine:after-RestoreRow": 3,
    "engine:after-SaveRow": 3,
    "rows:fetching": 3,  # ahead of a pass
    "snapshot:before-rename": 3,
    "snapshot:after-rename": 3,
}
WEIGHTS = {
    "front": 4,
    "engine": 4,
    "sampler": 2,
    "sampler_engine": 2,
    "replica": 4,
    "client": 4,
    "point": 6,
    "drain": 1,
    "cut": 2,
    "delay": 1,
    "duplicate": 2,
    "memory": 1,
    "full": 1,
    "poison": 1,
    "full_store": 2,
    "slow_store": 1,
    "held_store": 1,
    "delete": 3,
    "damage": 1,
    "restore": 1,
    "renew_group": 3,
    "renew_replica": 3,
}
ON_RAY = {"node": 8}  # more of them
ENGINE_THERE_S = 60.0  # until one is on a node, at most
STARTING_S = (1.0, 8.0)  # without an answer, until what starts is hit
MOST_SILENT = 2  # faults between two answers, so that something starts in the end
REMOVAL_POINTS = ("removal:begun", "removal:before-record")
# A call with which three engines die is given up, which is right. So no engine is ended again until
# every call that was under way has been answered, nor while a fault point waits for one, nor while
# something happens beside the scripts.
ENDS_ENGINES = ("engine", "sampler_engine", "replica", "memory", "poison", "node")
# Calls beside the scripts know of no other timeline.
BESIDE = ("poison", "delete", "damage", "restore")
ALWAYS_BEARABLE = ("front", "client", "sampler", "cut")
STORE_FULL_S = 1.5
SLOW_S = 0.02
BRANCH_ANSWERS = 15  # until a timeline is abandoned, at least
ASIDE_LIMIT_S = 400.0
CALM_ANSWERS = 6  # until delays and duplicates end, and limits are lifted


class Faults:
    """Of one stage. `look` is called often."""

    def __init__(
        self, stage: Stage, random: Random, gap: int, small_disk: Path | None, starts: bool
    ) -> None:
        """`gap`: answers between two faults, about. `starts`: what starts for long is hit too."""
        self._stage = stage
        self._random = random
        self._gap = gap
        self._small_disk = small_disk
        self._next = random.randint(1, gap)
        self._weights = WEIGHTS | (ON_RAY if stage.cluster else {})
        self._starts = starts
        self._answered = 0
        self._silent = 0  # faults since the last answer
        self._silent_until_s = float("inf")
        self._calm: list[tuple[int, Callable[[], None]]] = []  # at how many answers, what ends
        self._threads: list[threading.Thread] = []
        self._asides: list[Aside] = []
        self._timeline = 0  # the last that there was
        self._branch_end = 0  # at how many answers the timeline is abandoned; 0: it is not
        self._points = 0
        self._progress: list[Progress] = []  # of each user, when an engine was last ended
        self._engine_point: Path | None = None  # is there once the point set last has ended one
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []

    @property
    def refusals(self) -> bool:
        """Whether saves may have been refused."""
        return self.done["full_store"] > 0

    @property
    def abandoning(self) -> bool:
        """Whether all that is done now will be undone."""
        return self._branch_end > 0

    def look(self) -> None:
        answered = self._stage.answered()
        if self.abandoning and self._may_turn_back(answered):
            self._turn_back()
        for at, end in [each for each in self._calm if each[0] <= answered]:
            self._calm.remove((at, end))
            end()
        if answered < self._next and not self._starting(answered):
            return
        self._next = answered + self._random.randint(1, 2 * self._gap)
        for _ in range(self._random.choice((1, 1, 2))):
            (name,) = self._random.choices(list(self._weights), list(self._weights.values()))
            self.do(self._bearable(name))

    def _starting(self, answered: int) -> bool:
        """Whether there was no answer for so long that what starts shall be hit."""
        if not self._starts:
            return False
        now_s = time.monotonic()
        if answered > self._answered:
            self._answered, self._silent = answered, 0
        elif self._silent == MOST_SILENT or now_s < self._silent_until_s:
            return False
        else:
            self._silent += 1
        self._silent_until_s = now_s + self._random.uniform(*STARTING_S)
        return self._silent > 0

    def _bearable(self, name: str) -> str:
        """The fault, or another in the place of one that must not be now."""
        waits = self._engine_point is not None and not self._engine_point.exists()
        if (name in BESIDE and self.abandoning) or (
            name in ENDS_ENGINES and (waits or not self._may_end_engine())
        ):
            return self._random.choice(ALWAYS_BEARABLE)
        return name

    def _may_end_engine(self) -> bool:
        """Whether no call can lose a third engine; if so, takes it that one is ended now."""
        if any(thread.is_alive() for thread in self._threads):
            return False
        users = self._stage.users
        before, now = self._progress, self._progress_now()
        for user, then, is_at in zip(users, before, now, strict=False):
            if not user.ended and not is_at.has_left(then):
                return False
        self._progress = now
        return True

    def _progress_now(self) -> list[Progress]:
        return [user.progress for user in self._stage.users]

    def do(self, name: str) -> None:
        self.done[name] += 1
        logging.info("fault: %s", name)
        getattr(self, f"_{name}")()

    def end(self) -> None:
        """Lifts what is still imposed, and waits for what happens beside the scripts."""
        for _, end in self._calm:
            end()
        self._calm.clear()
        self._join()
        for aside in self._asides:
            self._note(aside.look_back())

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(ASIDE_LIMIT_S)
            if thread.is_alive():
                self.problems.append(f"{thread.name} was never done")
        self._threads.clear()

    def _beside(self, aside: Aside) -> None:
        def act() -> None:
            self._note(aside.act())
            self._progress = self._progress_now()  # what is under way may have lost engines by it

        self._asides.append(aside)
        self._do_beside(act, type(aside).__name__)

    def _do_beside(self, act: Callable[[], None], name: str | None = None) -> None:
        thread = threading.Thread(target=act, name=name)
        thread.start()
        self._threads.append(thread)

    def _note(self, problems: Iterable[str]) -> None:
        try:
            self.problems += problems
        except Exception as error:
            logging.exception("beside the scripts")
            self.problems.append(f"beside the scripts: {error!r}")

    def _later(self, end: Callable[[], None]) -> None:
        self._calm.append((self._stage.answered() + CALM_ANSWERS, end))

    def _front(self) -> None:
        self._engine_point = None  # whose next start has none
        self._stage.trainer.kill()

    def _engine(self) -> None:
        """That of one group."""
        if engines := self._stage.trainer.engines():
            with suppress(psutil.NoSuchProcess):
                self._random.choice(engines).kill()

    def _node(self) -> None:
        """Loses a node of the cluster, and all engines that are there, as soon as there are."""
        stage = self._stage
        lost, deadline = stage.nodes_lost, time.monotonic() + ENGINE_THERE_S
        while stage.nodes_lost == lost and time.monotonic() < deadline:
            driven = [each for s in (stage.trainer, stage.sampler) for each in s.engines()]
            if engines := [each for each in driven if is_on_node(each)]:
                with suppress(psutil.Error, AssertionError):  # it has died meanwhile
                    stage.lose_node_of(self._random.choice(engines))
            else:
                time.sleep(LOOK_S)

    def _renew_group(self) -> None:
        self._do_beside(partial(self._renew, self._stage.trainer, "Group"))

    def _renew_replica(self) -> None:
        self._do_beside(partial(self._renew, self._stage.sampler, "Replica"))

    def _renew(self, service: Supervised, kind: str) -> None:
        with suppress(grpc.RpcError):  # the front has died meanwhile, or an engine at its start
            self._stage.renew(service, kind)

    def _sampler(self) -> None:
        self._stage.sampler.kill()

    def _sampler_engine(self) -> None:
        self._stage.sampler.kill_engine()

    def _replica(self) -> None:
        """Kills one of the sampler's engines; what it had goes to the other."""
        replicas = self._stage.sampler.engines()
        for replica in self._random.sample(replicas, min(1, len(replicas))):
            with suppress(psutil.NoSuchProcess):
                replica.kill()

    def _client(self) -> None:
        self._random.choice(self._stage.users).kill()

    def _drain(self) -> None:
        self._random.choice((self._stage.trainer, self._stage.sampler)).restart()

    def _point(self) -> None:
        """The next start dies between two writes of a promise."""
        points = FRONT_POINTS | (ENGINE_POINTS if self._may_end_engine() else {})
        name = self._random.choice(list(points))
        self._die_at(name, min(self._random.randint(1, points[name]) for _ in range(2)))  # soon

    def _die_at(self, name: str, times: int) -> None:
        self._points += 1
        once = self._stage.folder / f"died-{self._points}"
        self._engine_point = once if name in ENGINE_POINTS else None
        self._stage.trainer.start_next_with(dying_at(f"{name}@{times}@{once}"))
        self._stage.trainer.kill()

    def _cut(self) -> None:
        for proxy in self._stage.proxies:
            proxy.cut()

    def _delay(self) -> None:
        for proxy in self._stage.proxies:
            proxy.delay_s = 0.05
        self._later(self._no_delay)

    def _no_delay(self) -> None:
        for proxy in self._stage.proxies:
            proxy.delay_s = 0.0

    def _duplicate(self) -> None:
        for proxy in self._stage.proxies:
            proxy.duplicating = True
            proxy.cut()
        self._later(self._no_duplicate)

    def _no_duplicate(self) -> None:
        for proxy in self._stage.proxies:
            proxy.duplicating = False

    def _memory(self) -> None:
        """Leaves an engine no memory beyond what it has."""
        for engine in self._stage.trainer.engines()[-1:]:
            with suppress(psutil.NoSuchProcess):
                engine.rlimit(psutil.RLIMIT_AS, (engine.memory_info().vms, -1))

    def _full(self) -> None:
        """Fills the disk of the state, if it has one of its own."""
        if self._small_disk is None:
            return
        filler = self._small_disk / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(b"\0" * 65536) == 65536:
                pass
        timer = threading.Timer(2.0, lambda: filler.unlink(missing_ok=True))
        timer.start()
        self._threads.append(timer)

    def _poison(self) -> None:
        self._beside(Poison(self._stage))

    def _full_store(self) -> None:
        """Leaves the store some room, so that saves break off anywhere."""
        self._stage.bad_store.fill(self._random.randint(0, 12))
        timer = threading.Timer(STORE_FULL_S, self._stage.bad_store.mend, ("full",))
        timer.start()
        self._threads.append(timer)

    def _slow_store(self) -> None:
        self._stage.bad_store.slow(SLOW_S)
        self._later(lambda: self._stage.bad_store.mend("slow"))

    def _held_store(self) -> None:
        self._beside(Held(self._stage))

    def _delete(self) -> None:
        """While the front dies at a point of the deletion, or at any time, or lives."""
        how = self._random.choice((*REMOVAL_POINTS, "kill", ""))
        after_s = self._random.uniform(0.0, 0.3)
        if how in REMOVAL_POINTS:
            self._die_at(how, 1)
        kill_after_s = after_s if how == "kill" else None
        named = self._random.random() < 0.5
        self._beside(Deletion(self._stage, self._random.randrange(1000), kill_after_s, named))

    def _damage(self) -> None:
        random = Random(self._random.random())
        self._beside(Damage(self._stage, self._random.randrange(1000), random))

    def _restore(self) -> None:
        """What is done from now on will be undone: a copy of the state is put in its place."""
        self._join()
        self._timeline += 1
        self._stage.turn_to(self._timeline, self._copy)
        self._branch_end = self._stage.answered() + BRANCH_ANSWERS

    def _may_turn_back(self, answered: int) -> bool:
        """Whether the timeline has done what there is to forget, or can do no more."""
        enough = answered >= self._branch_end and self._stage.has_parted(self._timeline)
        return enough or self._stage.settled

    def _turn_back(self) -> None:
        self._join()
        self._branch_end = 0
        self._stage.turn_back(self._copy)

    @property
    def _copy(self) -> Path:
        return self._stage.folder / f"copy-{self._timeline}"
