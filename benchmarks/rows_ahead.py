"""What do hints of the queue save? Runs take turns, a pass and a step each, and few of their rows
fit into memory: the others are in files, and come ahead of their passes or when these ask.

    python -m benchmarks.rows_ahead [--runs 8] [--fit 3] [--tokens 64]

In a round all runs have one turn; rounds with hints and without are in turn too. Files are in the
system's cache, so disks are left out; what a hint costs where all rows fit is measured as well.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.comparison import Row, report
from benchmarks.workloads import ADAM, LORA, SMOLLM2, InProcess, random_documents
from mint_core.lora.bank import Part
from tests.engines_in_process import make_engine
from trainer_service.engine.ahead import Ahead
from trainer_service.engine.engine import Engine
from trainer_service.engine.rows import Rows
from trainer_service.jobs import CrossEntropy, Document, Plan, StepRow, StepRows, Tile

ROUNDS = 7
HINTED = 4  # runs that a plan names

Round = Callable[[bool], tuple[float, float]]


def turns(
    engine: Engine, hinted: Ahead, names: Sequence[str], documents: tuple[Document, ...]
) -> Round:
    """A round's seconds, and those in which its passes and steps waited for rows, with hints, as
    `hinted` takes them, or without.
    """
    rows = engine._rows
    waited_s = [0.0]

    def timed(*args: object) -> None:
        started = time.perf_counter()
        Rows._bring(rows, *args)  # type: ignore[arg-type]
        waited_s[0] += time.perf_counter() - started

    rows._bring = timed  # type: ignore[method-assign,assignment]

    def take(hints: bool) -> tuple[float, float]:
        rows.ahead.stop()
        rows.ahead = hinted if hints else Ahead(rows._device, None)
        waited_s[0] = 0.0
        started = time.perf_counter()
        for i, name in enumerate(names):
            coming = tuple([*names[i + 1 :], *names[:i]][:HINTED]) if hints else ()
            engine.run(Plan((_tile(name, documents),), coming))
            engine.run(StepRows((StepRow(name, ADAM),), coming))
        return time.perf_counter() - started, waited_s[0]

    return take


def _tile(name: str, documents: tuple[Document, ...]) -> Tile:
    return Tile(
        training_run_id=name,
        sequence=1,
        index=0,
        documents=documents,
        loss=CrossEntropy(),
        backward=True,
        weighted_only=True,
    )


def measured(take: Round, rounds: int) -> dict[bool, tuple[float, float]]:
    """Medians of rounds, seconds and waits, with hints and without."""
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number in range(rounds + 1):
        for hints in found:
            times = take(hints)
            if number:
                found[hints].append(times)
    return {
        hints: (statistics.median(s for s, _ in each), statistics.median(w for _, w in each))
        for hints, each in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--fit", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    asked = parser.parse_args()
    documents = random_documents([asked.tokens], vocabulary_size=49152)
    found = []
    for fit in (asked.fit, asked.runs):
        with tempfile.TemporaryDirectory() as folder:
            engine = make_engine(SMOLLM2, row_folder=Path(folder))
            row_bytes = len(Part) * engine._bank.rank_class(LORA.rank).part_bytes
            engine._rows._device.limit_bytes = fit * row_bytes
            names = InProcess(engine, asked.runs).names
            hinted = engine._rows.ahead
            medians = measured(turns(engine, hinted, names, documents), ROUNDS)
            print(f"{fit} of {asked.runs} rows fit, with hints: {dict(hinted.counts)}")
        title = f"{asked.runs} runs, {fit} rows of {row_bytes / 2**20:.0f} MiB fit"
        for name, place in (("a turn", 0), ("of it waits for rows", 1)):
            ours, theirs = (1e3 * medians[hints][place] / asked.runs for hints in (True, False))
            found.append(
                Row(f"{title}: {name}", ours, theirs, theirs / max(ours, 1e-9), None, "ms")
            )
    report(found)


if __name__ == "__main__":
    main()
