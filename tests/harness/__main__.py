"""`python -m tests.harness KILLS SEED [--on ray] [--minutes N]`: trains and samples for four
tenants while processes are killed, until so many were, and checks all that was said. Status 1 and a
line per problem if anything was lost, done twice, or differs in a bit from what a server without
faults says. In every other round trainer and sampler share no folder.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.harness.checker import Event, crossings, problems
from tests.harness.faults import Faults
from tests.harness.stage import BESIDE, SILENCE_LIMIT_S, Hosting, staged
from tests.ray_cluster import running_cluster

USERS = 4
ENGINES = 2  # of each service that faults befall; the others have one
DISK_MIB = 96


@dataclass
class Report:
    kills: Counter[str] = field(default_factory=Counter)  # by whose they were
    faults: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    rounds: int = 0
    crossings: int = 0  # names that have held the weights of an abandoned timeline
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        counts = f"rounds={self.rounds} kills={self.kills.total()} calls={self.calls}"
        killed, faults = _named(self.kills), _named(self.faults)
        return f"{counts} crossings={self.crossings} killed: {killed} faults: {faults}"


def _named(counts: Counter[str]) -> str:
    return " ".join(f"{name}={count}" for name, count in sorted(counts.items()))


@dataclass(frozen=True, slots=True)
class Play:
    """The same scripts, again and again."""

    folder: Path
    model: Path
    steps: int
    hosting: Hosting

    def undisturbed(self) -> list[Event]:
        folder = self.folder / "undisturbed"
        folder.mkdir()
        with staged(folder, self.model, USERS, folder / "state") as stage:
            stage.start_users(USERS, self.steps)
            for _ in stage.running():
                pass
            found = stage.history()
            assert not stage.kills(), "something died by itself"
        return list(found)

    def round(
        self, number: int, random: Random, gap: int, first: Sequence[str], expected: Sequence[Event]
    ) -> Report:
        """One play with faults; those in `first` are made for certain."""
        folder = self.folder / f"round-{number}"
        folder.mkdir()
        with (
            small_disk(folder / "state") as disk,
            staged(
                folder,
                self.model,
                USERS,
                folder / "state" / "journal",
                engines=ENGINES,
                wire=number % 2 == 0,
                hosting=self.hosting,
            ) as stage,
        ):
            stage.start_users(USERS, self.steps)
            starts = self.hosting.cluster is not None and not first  # they take 5 to 15 s there
            faults = Faults(stage, random, gap, disk, starts)
            left = list(first)
            for _ in stage.running():
                if left and not faults.abandoning and stage.answered() > len(first) - len(left):
                    faults.do(left.pop(0))
                faults.look()
            faults.end()
            found = stage.history()
            wrong = problems(found, expected, refusals=faults.refusals)
            told = [*faults.problems, *wrong]
            if stage.stuck:
                told.insert(0, f"nobody was answered for {SILENCE_LIMIT_S:.0f} s")
            calls = sum(event["event"] == "answered" for event in found)
            return Report(stage.kills(), faults.done, calls, 1, crossings(found), told)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of the folder's own, where that can be had; else None, and a folder."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def run(
    folder: Path,
    model: Path,
    kills: int,
    seed: int,
    *,
    steps: int,
    gap: int,
    first: Sequence[str],
    hosting: Hosting = BESIDE,
    limit_s: float = float("inf"),
) -> Report:
    """Plays until there were so many kills, or there is a problem, and begins no round once so much
    time has gone. The quiet play, with which all are compared, has its engines beside their fronts.
    """
    ends_s = time.monotonic() + limit_s
    random, play, total = Random(seed), Play(folder, model, steps, hosting), Report()
    expected = play.undisturbed()
    while total.kills.total() < kills and not total.problems and time.monotonic() < ends_s:
        report = play.round(total.rounds, random, gap, first, expected)
        total.kills += report.kills
        total.calls += report.calls
        total.rounds += 1
        total.crossings += report.crossings
        total.faults += report.faults
        total.problems += report.problems
        logging.info("so far: %s", total.line())
    return total


@contextmanager
def hosting(folder: Path, where: str = "processes") -> Iterator[Hosting]:
    """Engines are beside their fronts, or on two nodes of a cluster of Ray that share no folder
    with them.
    """
    if where == "processes":
        yield BESIDE
        return
    with running_cluster(head_cpus=0, more_nodes=2) as cluster:
        flags = {"engines_on": where, "ray_address": cluster.address, "ray_folder": folder / "node"}
        yield Hosting(flags, cluster)


def main() -> int:
    from tests.models import tiny_qwen3

    parser = argparse.ArgumentParser("python -m tests.harness")
    parser.add_argument("kills", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("--on", choices=("processes", "ray"), default="processes")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="until the last round")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nothing that was started stays
    # Processes that are started would otherwise compile our sources once more each.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s")
    folder = Path(tempfile.mkdtemp(prefix="mint-faults-"))
    logging.info("logs and histories are in %s", folder)
    model = tiny_qwen3(folder / "model")
    started_s = time.monotonic()
    with hosting(folder, given.on) as where:
        report = run(
            folder,
            model,
            given.kills,
            given.seed,
            steps=8,
            gap=5,
            first=(),
            hosting=where,
            limit_s=60 * given.minutes,
        )
    elapsed_s = time.monotonic() - started_s
    sys.stdout.writelines(f"{problem}\n" for problem in report.problems)
    sys.stdout.write(f"seed={given.seed} {report.line()} elapsed_s={elapsed_s:.0f}\n")
    return int(bool(report.problems))


if __name__ == "__main__":
    sys.exit(main())
