"""A part of the checklist: rows that do not fit on the device, with hints of the queue and without,
and how fast they come from page-locked memory and from any other.
"""

import torch

from benchmarks.gpu_models import Bench
from benchmarks.gpu_trainer import RANK, Runs, documents, engine_of
from benchmarks.rows_ahead import measured, turns
from mint_core.lora.bank import Part, zero_vector
from trainer_service.engine.host_rows import host_memory

RUNS, FIT = 8, 3


def rows_ahead(bench: Bench) -> None:
    """Turns of runs, of which a few fit; the others are in host memory (in files on a CPU)."""
    with engine_of(bench, "0.6B") as engine:
        part_bytes = engine._bank.rank_class(RANK).part_bytes
        engine._rows._device.limit_bytes = FIT * len(Part) * part_bytes
        runs = Runs(engine, RUNS)
        ahead = engine._rows.ahead
        for tokens in (64, 1024):
            take = turns(engine, ahead, runs.names, documents(bench, [tokens]))
            found = measured(take, bench.size(7, 2))
            for name, place in (("a turn", 0), ("of it waits for rows", 1)):
                ours, theirs = (1e3 * found[hints][place] / RUNS for hints in (True, False))
                title = f"{RUNS} runs x {tokens} tokens, {FIT} fit: {name}"
                bench.note(title, ours, "ms", f"without hints {theirs:.3g}")
        print(dict(ahead.counts), engine.row_counts(), flush=True)
        runs.drop()
    _copies(bench, part_bytes // 4)


def _copies(bench: Bench, size: int) -> None:
    target = torch.empty(size, device=bench.device)
    memory = host_memory(bench.device)
    vectors = {"ordinary": zero_vector(size, torch.device("cpu")).fill_(1.0)}
    if memory:
        vectors["page-locked"] = memory.take(size, 4 * size).fill_(1.0)
    for name, vector in vectors.items():
        seconds = bench.seconds(lambda v=vector: target.copy_(v, non_blocking=True))  # type: ignore[misc]
        bench.note(f"a part from {name} memory", 4 * size / seconds / 1e9, "GB/s")
