"""How evenly groups are used, how long calls wait, and what moves: a simulation of many groups,
driven by the trainer's own placement, balancing and planner.

`python -m benchmarks.placement --groups 100 --runs 100000 --seconds 900 --seed 1 [--seeds 10]`

Runs are idle most of the time; so many train at once as give the groups the `--load` that is asked
for, if they stood in one line. Three kinds, by what public recipes do: fine-tuning (8,192 tokens a
call, 0.3 s between two), RL (65,536 tokens, 40 s of sampling between two) and small experiments
(1,024 tokens, 5 s). A session takes 5 minutes on average, and then another run begins one, wherever
it is. Of one seed the sessions are the same whatever the way of placing. A third of the way in, 1 %
of the groups (one at least) end for good; halfway others come. A call's wait is the time that it
took beyond its own tokens' at an engine's speed. Of several seeds, means are told.

Left out: an engine's time per pass, steps, and that a row may come from disk without a move.
"""

import argparse
import heapq
import itertools
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from statistics import fmean

import numpy as np

from trainer_service.groups.balancing import Balancing, Move, pause_s
from trainer_service.groups.placement import Placement
from trainer_service.jobs import CrossEntropy, Document, Plan, Tile
from trainer_service.queue.planner import Planner, most_tile_tokens

PASS_TOKENS, TOKENS_PER_S = 16_384, 10_000
KINDS = (
    (8192, 0.3, 0.3),
    (65_536, 40.0, 0.3),
    (1024, 5.0, 0.4),
)  # tokens, think time, part of runs
SESSION_S, ROW_BYTES, TENANTS = 300.0, 300e6, 200
LOOK_S, WARM_UP_S = 1.0, 120.0


@dataclass(slots=True, eq=False)
class SimulatedRun:
    name: str
    tenant: str
    tokens: int
    think_s: float
    row_bytes: int
    random: Random = field(default_factory=Random)  # of its session
    calls: bool = False  # or thinks, in a session
    session_ends_s: float = 0.0
    tiles_left: int = 0
    called_s: float = 0.0
    not_before_s: float = 0.0  # it moves until then
    sequence: int = 0


@dataclass(slots=True, eq=False)
class SimulatedGroup:
    name: str
    planner: Planner = field(default_factory=lambda: Planner(PASS_TOKENS))
    at_work: set[str] = field(default_factory=set)
    busy: bool = False
    dead: bool = False
    busy_s: float = 0.0


class Simulation:
    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.random = Random(seed)  # of users alone
        self.placing = Random(seed)
        self.options = options
        self.placement = Placement(Random(seed))
        self.balancing = Balancing(self.placement)
        self.groups: dict[str, SimulatedGroup] = {}
        self.events: list[tuple[float, int, object, object]] = []
        self.numbers = itertools.count()
        self.waits: list[float] = []
        self.moves: Counter[str] = Counter()
        self.moved_bytes = 0
        self.now_s = self.decision_s = 0.0
        self.decisions = 0
        for number in range(options.groups):
            self.add_group(f"g{number}")
        self.runs = [self.make(number) for number in range(options.runs)]
        self.by_name = {run.name: run for run in self.runs}
        for run in self.runs:
            self.place(run)

    def make(self, number: int) -> SimulatedRun:
        tokens, think_s, _ = self.random.choices(KINDS, [part for *_, part in KINDS])[0]
        size = int(self.random.lognormvariate(0, 0.5) * ROW_BYTES)
        tenant = f"t{int(TENANTS * self.random.random() ** 2)}"  # a few have many
        return SimulatedRun(f"r{number}", tenant, tokens, think_s, size)

    def add_group(self, name: str) -> None:
        self.groups[name] = SimulatedGroup(name)
        self.placement.open(name, memory_bytes=int(80e9))

    def at(self, time_s: float, act: object, what: object = None) -> None:
        heapq.heappush(self.events, (time_s, next(self.numbers), act, what))

    def place(self, run: SimulatedRun) -> None:
        started = time.perf_counter()
        if self.options.placement == "random":
            name = self.placing.choice([load.name for load in self.placement.opened()])
        else:
            name = self.placement.choose(self.now_s) or ""
        self.placement.place(run.name, name, run.row_bytes, self.now_s)
        self.decision_s += time.perf_counter() - started
        self.decisions += 1

    def play(self) -> None:
        mean_demand = sum(
            part * tokens / (tokens + think_s * TOKENS_PER_S) for tokens, think_s, part in KINDS
        )
        self.now_s = 3600.0  # what the runs had done when they came is forgotten
        self.start_s, self.end_s = self.now_s, self.now_s + self.options.seconds
        for _ in range(round(self.options.load * self.options.groups / mean_demand)):
            self.at(self.now_s + self.random.uniform(0, SESSION_S / 10), self.begin_session)
        self.at(self.now_s, self.look)
        self.at(self.start_s + self.options.seconds / 3, self.end_groups)
        while self.events:
            self.now_s, _, act, what = heapq.heappop(self.events)
            if self.now_s >= self.end_s:
                return
            act(what)  # type: ignore[operator]

    def begin_session(self, _: object) -> None:
        """What is drawn for users is drawn here, at times that do not depend on how calls fare."""
        run = self.random.choice(self.runs)
        while run.session_ends_s > self.now_s:
            run = self.random.choice(self.runs)
        run.session_ends_s = self.now_s + self.random.expovariate(1 / SESSION_S)
        run.random = Random(self.random.random())
        self.at(run.session_ends_s, self.begin_session)
        if not run.calls:
            self.call(run)

    def call(self, run: SimulatedRun) -> None:
        run.calls = self.now_s < run.session_ends_s
        if run.calls:
            run.called_s = self.now_s
            self.hand_in(run)

    def hand_in(self, run: SimulatedRun) -> None:
        if self.now_s < run.not_before_s:
            self.at(run.not_before_s, self.hand_in, run)
            return
        group = self.groups[self.placement.homes[run.name].name]
        if group.dead:
            self.place(run)
            self.move_takes(run, "deaths")
            self.at(run.not_before_s, self.hand_in, run)
            return
        run.sequence += 1
        tiles = [
            Tile(
                training_run_id=run.name,
                sequence=run.sequence,
                index=index,
                documents=(DOCUMENTS[min(run.tokens, most_tile_tokens(PASS_TOKENS))],),
                loss=CrossEntropy(),
                backward=True,
                weighted_only=False,
            )
            for index in range(-(-run.tokens // most_tile_tokens(PASS_TOKENS)))
        ]
        run.tiles_left = len(tiles)
        group.planner.add(run.tenant, tiles)
        group.at_work.add(run.name)
        if not group.busy:
            self.compute(group)

    def compute(self, group: SimulatedGroup) -> None:
        plan = group.planner.next_job()
        group.busy = plan is not None and not group.dead
        if group.busy:
            assert isinstance(plan, Plan)
            took_s = sum(len(tile.documents[0].tokens) for tile in plan.tiles) / TOKENS_PER_S
            group.busy_s += took_s if self.now_s > self.start_s + WARM_UP_S else 0.0
            self.at(self.now_s + took_s, self.hand_out, (group, plan))

    def hand_out(self, what: tuple[SimulatedGroup, Plan]) -> None:
        group, plan = what
        for tile in plan.tiles:
            run = self.by_name[tile.training_run_id]
            run.tiles_left -= 1
            if not run.tiles_left:
                group.at_work.discard(run.name)
                if self.now_s > self.start_s + WARM_UP_S:
                    waited_s = self.now_s - run.called_s - run.tokens / TOKENS_PER_S
                    self.waits.append(max(0.0, waited_s))
                self.at(self.now_s + run.random.expovariate(1 / run.think_s), self.call, run)
        if group.dead:
            for name in sorted(group.at_work):  # they are called again elsewhere
                self.at(self.now_s, self.hand_in, self.by_name[name])
            group.at_work.clear()
        else:
            self.compute(group)

    def look(self, _: object) -> None:
        for group in self.groups.values():
            self.placement.observe(group.name, group.at_work, LOOK_S, self.now_s)
        if self.options.placement == "balanced":
            for move in self.balancing.moves(self.now_s):
                self.try_move(move)
        self.at(self.now_s + LOOK_S, self.look)

    def try_move(self, move: Move) -> None:
        run = self.by_name[move.run]
        home = self.placement.homes[run.name].name
        if home != move.source or self.groups[move.target].dead:
            self.balancing.ended(move)
            return
        if run.name in self.groups[move.source].at_work:  # when it comes to rest
            self.at(self.now_s + 0.05, self.try_move, move)
            return
        self.placement.place(run.name, move.target, run.row_bytes, self.now_s)
        self.move_takes(run, "balance")
        self.at(run.not_before_s, self.balancing.ended, move)

    def move_takes(self, run: SimulatedRun, why: str) -> None:
        self.moves[why] += 1
        self.moved_bytes += run.row_bytes
        run.not_before_s = self.now_s + pause_s(run.row_bytes)

    def end_groups(self, _: object) -> None:
        count = max(1, self.options.groups // 100)
        for name in list(self.groups)[:count]:
            self.groups[name].dead = True
            self.placement.close(name)
        self.at(self.start_s + self.options.seconds / 2, self.come, count)

    def come(self, count: int) -> None:
        for number in range(count):
            self.add_group(f"new{number}")

    def result(self) -> dict[str, float]:
        alive = [group for group in self.groups.values() if not group.dead]
        measured_s = self.options.seconds - WARM_UP_S
        shares = np.array([group.busy_s / measured_s for group in alive])
        waits = np.array(self.waits)
        return {
            "calls": len(waits),
            "busy_share": float(shares.mean()),
            "busy_share_p5": float(np.quantile(shares, 0.05)),
            "wait_s_p50": float(np.median(waits)),
            "wait_s_p99": float(np.quantile(waits, 0.99)),
            "moves_at_deaths": self.moves["deaths"],
            "moves_of_balancing": self.moves["balance"],
            "moved_gib": self.moved_bytes / 2**30,
            "us_per_placement": 1e6 * self.decision_s / self.decisions,
        }


def document(tokens: int) -> Document:
    numbers = np.zeros(tokens, np.int64)
    return Document(tokens=numbers, targets=numbers, weights=np.ones(tokens, np.float32))


DOCUMENTS = {tokens: document(tokens) for tokens in (1024, most_tile_tokens(PASS_TOKENS))}


def play(options: argparse.Namespace, seed: int) -> dict[str, float]:
    simulation = Simulation(options, seed)
    simulation.play()
    return simulation.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=100)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=1, help="the first one")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    ways = ("random", "placed", "balanced")
    parser.add_argument("--placement", choices=ways, default="balanced")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.seeds)
    results = [play(options, seed) for seed in seeds]
    means = {name: round(fmean(each[name] for each in results), 3) for name in results[0]}
    sys.stdout.write(json.dumps({**vars(options), **means}) + "\n")


if __name__ == "__main__":
    main()
