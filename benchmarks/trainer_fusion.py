"""What does it bring to compute the steps of several runs in one pass? Against the same engine, one
run at a time; and what do more runs cost at the same number of tokens? Rank 16, one thread.
"""

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.comparison import Row, faster, in_turn, report, share
from benchmarks.workloads import (
    InProcess,
    arithmetic,
    random_documents,
    small_engine,
    smollm2_engine,
    tiny_engine,
)
from tests.models import VOCABULARY_SIZE
from trainer_service.engine.engine import Engine
from trainer_service.jobs import Document

ROUNDS = 5
RUNS = 8
SHORT = (16, 24, 32, 40, 48, 56, 60, 64)  # tokens, one document for each run
CURVE = (1, 2, 4, 8, 16, 32, 64)  # runs
CURVE_TOKENS, CURVE_LENGTH = 2048, 32  # in all, and of each document
FLAT_RUNS, FLAT = 16, 1.1  # so many runs cost at most so many times one run's time


def fused(
    name: str, engine: Engine, data: Sequence[Sequence[Document]], target: float, calls: int
) -> Row:
    """A step of every run, together and in turn; each measurement is of `calls` of them."""
    runs = InProcess(engine, len(data))

    def repeated(train: Callable[..., None]) -> None:
        for _ in range(calls):
            train(*data, weighted=True)

    times = in_turn(
        {
            "together": partial(repeated, runs.train),
            "in turn": partial(repeated, runs.train_in_turn),
        },
        ROUNDS,
    )
    runs.drop()
    return faster(name, times["together"], times["in turn"], target)


def curve(name: str, engine: Engine, calls: int) -> list[Row]:
    """The same documents, dealt out to 1, 2, 4, ... runs; ours over the time of one run."""
    documents = random_documents(
        [CURVE_LENGTH] * (CURVE_TOKENS // CURVE_LENGTH), vocabulary_size=VOCABULARY_SIZE
    )
    groups = {count: InProcess(engine, count) for count in CURVE}

    def train(count: int) -> None:
        for _ in range(calls):
            groups[count].train(*(documents[i::count] for i in range(count)), weighted=True)

    times = in_turn({str(count): partial(train, count) for count in CURVE}, ROUNDS)
    return [
        share(
            f"{count} runs, {CURVE_TOKENS} tokens in all, {name}",
            times[str(count)],
            times["1"],
            FLAT if count <= FLAT_RUNS else None,
            "CPU seconds",
        )
        for count in CURVE[1:]
    ]


def main() -> None:
    tiny = tiny_engine()
    short = [random_documents([n], vocabulary_size=VOCABULARY_SIZE, seed=n) for n in SHORT]
    rows = [fused("8 runs x 1 short document, tiny model", tiny, short, 3.0, 10)]
    rows += curve("tiny model", tiny, 3)
    rows += curve("small model", small_engine(), 1)
    large = smollm2_engine()
    examples = arithmetic(4 * RUNS)
    fours = [examples[i::RUNS] for i in range(RUNS)]
    rows.append(fused("8 runs x 4 short examples, SmolLM2", large, fours, 1.25, 1))
    long = [random_documents([256], vocabulary_size=49152, seed=i) for i in range(RUNS)]
    rows.append(fused("8 runs x 256 tokens, SmolLM2", large, long, 0.97, 1))
    report(rows)


if __name__ == "__main__":
    main()
