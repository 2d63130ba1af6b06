"""What is done to a stage, drawn from a seed: when so many answers have come, one thing or two."""

import logging
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import psutil

import mint
from mint import types
from tests.engines.mortal import POISON
from tests.harness.history import Progress
from tests.harness.stage import Stage
from tests.supervised import dying_at

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
    "engine:after-WriteRow": 3,
    "engine:after-CreateRow": 3,
    "engine:after-RestoreRow": 3,
    "engine:after-SaveRow": 3,
    "snapshot:before-rename": 3,
    "snapshot:after-rename": 3,
}
WEIGHTS = {
    "front": 4,
    "engine": 4,
    "sampler": 2,
    "sampler_engine": 2,
    "client": 4,
    "point": 6,
    "drain": 1,
    "cut": 2,
    "delay": 1,
    "duplicate": 2,
    "memory": 1,
    "full": 1,
    "poison": 1,
}
# A call with which three engines die is given up, which is right. So no engine is ended again until
# every call that was under way has been answered, nor while a fault point waits for one.
ENDS_ENGINES = ("engine", "sampler_engine", "memory")
CALM_ANSWERS = 6  # until delays and duplicates end, and limits are lifted


class Faults:
    """Of one stage. `look` is called often."""

    def __init__(self, stage: Stage, random: Random, gap: int, small_disk: Path | None) -> None:
        """`gap`: answers between two faults, about."""
        self._stage = stage
        self._random = random
        self._gap = gap
        self._small_disk = small_disk
        self._next = random.randint(1, gap)
        self._calm: list[tuple[int, Callable[[], None]]] = []  # at how many answers, what ends
        self._aside: list[threading.Thread] = []
        self._points = 0
        self._progress: list[Progress] = []  # of each user, when an engine was last ended
        self._engine_point: Path | None = None  # is there once the point set last has ended one
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []

    def look(self) -> None:
        answered = self._stage.answered()
        for at, end in [each for each in self._calm if each[0] <= answered]:
            self._calm.remove((at, end))
            end()
        if answered < self._next:
            return
        self._next = answered + self._random.randint(1, 2 * self._gap)
        for _ in range(self._random.choice((1, 1, 2))):
            (name,) = self._random.choices(list(WEIGHTS), list(WEIGHTS.values()))
            self.do(self._bearable(name))

    def _bearable(self, name: str) -> str:
        """The fault, or one that ends no engine in the place of one that must not."""
        waits = self._engine_point is not None and not self._engine_point.exists()
        if name not in ENDS_ENGINES or (not waits and self._may_end_engine()):
            return name
        return "front"

    def _may_end_engine(self) -> bool:
        """Whether no call can lose a third engine; if so, takes it that one is ended now."""
        users = self._stage.users
        before, now = self._progress, [user.progress for user in users]
        for user, then, is_at in zip(users, before, now, strict=False):
            if not user.ended and not is_at.has_left(then):
                return False
        self._progress = now
        return True

    def do(self, name: str) -> None:
        self.done[name] += 1
        logging.info("fault: %s", name)
        getattr(self, f"_{name}")()

    def end(self) -> None:
        """Lifts what is still imposed, and waits for what was sent aside."""
        for _, end in self._calm:
            end()
        self._calm.clear()
        for thread in self._aside:
            thread.join(120)
            if thread.is_alive():
                self.problems.append("a call that ends engines was never answered")

    def _later(self, end: Callable[[], None]) -> None:
        self._calm.append((self._stage.answered() + CALM_ANSWERS, end))

    def _front(self) -> None:
        self._engine_point = None  # whose next start has none
        self._stage.trainer.kill()

    def _engine(self) -> None:
        self._stage.trainer.kill_engine()

    def _sampler(self) -> None:
        self._stage.sampler.kill()

    def _sampler_engine(self) -> None:
        self._stage.sampler.kill_engine()

    def _client(self) -> None:
        self._random.choice(self._stage.users).kill()

    def _drain(self) -> None:
        self._random.choice((self._stage.trainer, self._stage.sampler)).restart()

    def _point(self) -> None:
        """The next start dies between two writes of a promise."""
        points = FRONT_POINTS | (ENGINE_POINTS if self._may_end_engine() else {})
        name = self._random.choice(list(points))
        times = min(self._random.randint(1, points[name]) for _ in range(2))  # soon, mostly
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
        for engine in self._stage.trainer.engines():
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
        self._aside.append(timer)

    def _poison(self) -> None:
        thread = threading.Thread(target=self._send_poison)
        thread.start()
        self._aside.append(thread)

    def _send_poison(self) -> None:
        data = types.Datum(
            types.ModelInput.from_ints(POISON),
            {"target_tokens": POISON, "weights": [1.0] * len(POISON)},
        )
        with self._stage.client(-1) as service:
            run = service.create_lora_training_client(rank=1)
            try:
                run.forward_backward([data]).result(300)
                self.problems.append("a call that ends engines was answered")
            except mint.APIError as error:
                if error.reason != "ENGINE_FAULT":
                    self.problems.append(f"a call that ends engines was told {error}")
