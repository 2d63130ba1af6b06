"""Which way to apply adapters is the fastest? Each against the loop over segments, in turn.

The adapters of one group of linear layers alone, forward and backward, without the layers' own
product. The choice is in mint_core/lora/algorithms.py.
"""

import json
import time
from collections.abc import Callable

import numpy as np
import torch

from mint_core.lora.algorithms import GROUPED, LOOP, Adapted, Algorithm, Gradients
from mint_core.lora.bank import AdapterBank, Part
from mint_core.lora.groups import LinearShape, ModuleGroup, complete
from mint_core.lora.segments import Segment
from mint_core.lora.spec import AdapterSpec

# Of one layer, of narrow ones as q, k and v, and of two wide ones as gate and up.
GROUPS = tuple(
    complete(
        {str(i): LinearShape(width, out) for i, out in enumerate(outs)},
        [tuple(map(str, range(len(outs))))],
    )[0]
    for width, outs in ((64, (128,)), (576, (576, 192, 192)), (576, (1536, 1536)))
)
CASES = ((1, 8), (1, 256), (8, 8), (8, 256), (32, 32))  # adapters, and rows of each
RANKS = (8, 16, 64)
ROUNDS, LEAST_S = 15, 0.003  # and how long one reading takes at least
Row = dict[str, object]


def make_adapted(group: ModuleGroup, adapters: int, rows: int, rank: int) -> Adapted:
    bank = AdapterBank((group,), torch.device("cpu"))
    spec = AdapterSpec(rank=rank, alpha=32.0, use_rslora=False, seed=0, modules=group.modules)
    segments = []
    for i in range(adapters):
        row = bank.add(spec)
        row.part(Part.WEIGHTS).normal_()
        segments.append(Segment(i * rows, (i + 1) * rows, row, accumulate=True))
    return Adapted(tuple(segments), torch.device("cpu"), torch.float32)


def make_pass(group: ModuleGroup, adapted: Adapted, algorithm: Algorithm) -> Callable[[], None]:
    rows = adapted.covered.stop
    x, dx = torch.randn(2, rows, group.in_features)
    y, dy = torch.randn(2, rows, group.width)
    gradients = Gradients(x, dy.split(group.out_features, dim=1), dx)

    def run() -> None:
        saved = algorithm.forward(x, y.split(group.out_features, 1), adapted, group)
        algorithm.backward(gradients, saved, adapted, group)

    return run


def elapsed_s(run: Callable[[], None], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - started) / repeats


def measure(adapters: int, rows: int, rank: int) -> Row:
    """Medians over the loop's, the least and the most of all groups."""
    ratios = []
    for group in GROUPS:
        adapted = make_adapted(group, adapters, rows, rank)
        runs = [make_pass(group, adapted, algorithm) for algorithm in (LOOP, GROUPED)]
        elapsed_s(runs[0], 1)
        repeats = max(1, int(LEAST_S / elapsed_s(runs[0], 1)))
        times = [[elapsed_s(run, repeats) for run in runs] for _ in range(ROUNDS)]
        loop, grouped = np.median(times, axis=0)
        ratios.append(grouped / loop)
    return {
        "name": f"grouped, rank {rank}, {adapters} x {rows} rows",
        "least": round(min(ratios), 2),
        "most": round(max(ratios), 2),
    }


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    rows = [measure(*case, rank) for rank in RANKS for case in CASES]
    print("time over the loop's: least and most of the groups")
    print(*(f"{row['name']:55} {row['least']:6} {row['most']:6}" for row in rows), sep="\n")
    print(*map(json.dumps, rows), sep="\n")


if __name__ == "__main__":
    main()
