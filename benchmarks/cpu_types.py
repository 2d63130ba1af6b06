"""What do `--dtype bfloat16` and `--trade-bits-for-speed` bring on this CPU, against float32 with
bits of its own? A step of training, and of decoding under eight adapters. SmolLM2, one thread.
"""

from collections.abc import Callable
from functools import partial

from benchmarks.comparison import Row, faster, in_turn, report
from benchmarks.sampler_decode import ADAPTERS, PROMPTS
from benchmarks.sampler_workloads import Ours, adapter_path
from benchmarks.workloads import InProcess, arithmetic, smollm2_engine

ROUNDS = 5
KINDS: dict[str, dict[str, object]] = {
    "float32": {},
    "bits traded": {"trade_bits_for_speed": True},
    "bfloat16": {"dtype": "bfloat16"},
}


def measure(name: str, variants: dict[str, Callable[[], object]]) -> list[Row]:
    times = in_turn(variants, ROUNDS)
    others = [kind for kind in KINDS if kind != "float32"]
    return [faster(f"{name}, {kind}", times[kind], times["float32"], None) for kind in others]


def main() -> None:
    documents = arithmetic(16)
    runs = {kind: InProcess(smollm2_engine(**changes)) for kind, changes in KINDS.items()}
    steps = {k: partial(run.train, documents, weighted=True) for k, run in runs.items()}
    rows = measure("a step of 16 short examples", {**steps})
    runs.clear()
    paths = [adapter_path(i) for i in range(ADAPTERS)]
    samplers = {kind: Ours(ADAPTERS, **changes) for kind, changes in KINDS.items()}
    for name, prompts in ("one sequence", PROMPTS[:1]), ("8 sequences, 8 adapters", PROMPTS):
        rows += measure(name, {k: partial(s.generate, prompts, paths) for k, s in samplers.items()})
    report(rows)


if __name__ == "__main__":
    main()
