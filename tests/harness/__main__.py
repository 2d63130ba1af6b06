"""`python -m tests.harness KILLS SEED [ray]`: trains and samples for four tenants while processes
are killed, until so many were, and checks all that was said. Status 1 and a line per problem if
anything was lost, done twice, or differs in a bit from what a server without faults says.
"""

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import MappingProxyType

from tests.harness.checker import Event, crossings, problems
from tests.harness.faults import Faults
from tests.harness.stage import SILENCE_LIMIT_S, staged
from tests.ray_cluster import running_cluster

USERS = 4
GROUPS = 2  # of the trainer that faults befall; the other has one
DISK_MIB = 96


@dataclass
class Report:
    kills: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    rounds: int = 0
    crossings: int = 0  # names that have held the weights of an abandoned timeline
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        named = " ".join(f"{name}={count}" for name, count in sorted(self.faults.items()))
        counts = f"rounds={self.rounds} kills={self.kills} calls={self.calls}"
        return f"{counts} crossings={self.crossings} faults: {named}"


@dataclass(frozen=True, slots=True)
class Play:
    """The same scripts, again and again."""

    folder: Path
    model: Path
    steps: int
    hosting: Mapping[str, object]  # flags that say where engines run

    def undisturbed(self) -> list[Event]:
        folder = self.folder / "undisturbed"
        folder.mkdir()
        with staged(folder, self.model, USERS, folder / "state") as stage:
            stage.start_users(USERS, self.steps)
            for _ in stage.running():
                pass
            found = stage.history()
            assert stage.kills() == 0, "something died by itself"
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
                folder, self.model, USERS, folder / "state" / "journal", GROUPS, self.hosting
            ) as stage,
        ):
            stage.start_users(USERS, self.steps)
            faults = Faults(stage, random, gap, disk)
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
    hosting: Mapping[str, object] = MappingProxyType({}),
) -> Report:
    """Plays until there were so many kills, or there is a problem. The quiet play, with which all
    are compared, has its engines beside their fronts.
    """
    random, play, total = Random(seed), Play(folder, model, steps, hosting), Report()
    expected = play.undisturbed()
    while total.kills < kills and not total.problems:
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
def hosting(folder: Path, where: str = "processes") -> Iterator[Mapping[str, object]]:
    """Flags that say where engines run: beside their fronts, or on two nodes of a cluster of Ray
    that share no folder with them.
    """
    if where == "processes":
        yield {}
        return
    with running_cluster(head_cpus=0, more_nodes=2) as cluster:
        yield {
            "engines_on": where,
            "ray_address": cluster.address,
            "ray_folder": folder / "node",
        }


def main() -> int:
    from tests.models import tiny_qwen3

    kills, seed = map(int, sys.argv[1:3])
    # Processes that are started would otherwise compile our sources once more each.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s")
    folder = Path(tempfile.mkdtemp(prefix="mint-faults-"))
    logging.info("logs and histories are in %s", folder)
    model = tiny_qwen3(folder / "model")
    started_s = time.monotonic()
    with hosting(folder, *sys.argv[3:]) as where:
        report = run(folder, model, kills, seed, steps=8, gap=5, first=(), hosting=where)
    elapsed_s = time.monotonic() - started_s
    sys.stdout.writelines(f"{problem}\n" for problem in report.problems)
    sys.stdout.write(f"seed={seed} {report.line()} elapsed_s={elapsed_s:.0f}\n")
    return int(bool(report.problems))


if __name__ == "__main__":
    sys.exit(main())
