"""How fast is a step of training? Against the loop that a user would write, and against the rate at
which this CPU multiplies matrices. SmolLM2, rank 16 on all linear layers and the head, one thread.
"""

import statistics
from collections.abc import Sequence

import torch

from benchmarks.comparison import Row, faster, in_turn, report
from benchmarks.peft_loop import PeftLoop
from benchmarks.workloads import (
    ADAM,
    LONG,
    SMOLLM2,
    InProcess,
    arithmetic,
    needed_flops,
    random_documents,
    smollm2_engine,
)
from mint_core.lora.products import onednn
from trainer_service.jobs import Document

ROUNDS = 5
SIDE, PRODUCTS = 2048, 4  # of the matrix products that show the peak


def measure(
    name: str, documents: Sequence[Document], targets: tuple[float, float, float]
) -> list[Row]:
    """Rows of one workload. `targets`: WEIGHTED, all logprobs, share of the peak."""
    engine = smollm2_engine()
    run = InProcess(engine)
    loop = PeftLoop(SMOLLM2, run.specs[0], ADAM)
    square = torch.randn(SIDE, SIDE)
    largest = onednn.faster(square)
    times = in_turn(
        {
            "sgemm": lambda: [largest(square, square) for _ in range(PRODUCTS)],
            "weighted": lambda: run.train(documents, weighted=True),
            "all": lambda: run.train(documents, weighted=False),
            "loop": lambda: loop.train(documents),
        },
        ROUNDS,
    )
    peak = PRODUCTS * 2 * SIDE**3 / min(times["sgemm"]) / 1e9
    flops = needed_flops(engine.base, documents, run.specs[0].rank)
    rate = flops / statistics.median(times["weighted"]) / 1e9
    return [
        faster(f"{name}, WEIGHTED", times["weighted"], times["loop"], targets[0]),
        faster(f"{name}, all logprobs", times["all"], times["loop"], targets[1]),
        Row(f"{name}, share of sgemm's peak", rate, peak, rate / peak, targets[2], "GFLOP/s"),
    ]


def main() -> None:
    long = random_documents(LONG, vocabulary_size=49152)
    rows = measure("16 short examples", arithmetic(16), (1.45, 1.3, 0.70))
    report(rows + measure("documents of 64 to 512 tokens", long, (2.8, 2.5, 0.65)))


if __name__ == "__main__":
    main()
