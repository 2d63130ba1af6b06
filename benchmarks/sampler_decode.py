"""What does a step of decoding take? One sequence against transformers' generate with PEFT, eight
adapters in one batch against the base model alone and against adapter after adapter, and what share
of the memory's bandwidth that is. SmolLM2, rank 16 on all linear layers and the head, one thread.
"""

import statistics
from collections.abc import Callable, Sequence

import torch

from benchmarks.comparison import Row, cpu_seconds, faster, report
from benchmarks.sampler_workloads import (
    Generate,
    Ours,
    Request,
    adapter_path,
    agreement,
    random_requests,
)
from sampler_service.jobs import BASE_MODEL

ROUNDS = 5
ADAPTERS = 8
TOKENS = 24  # of each output; what comes before the first is taken off
PROMPTS = random_requests(ADAPTERS, (32, 32), (TOKENS, TOKENS))
SUM_NUMBERS = 2**26  # that are added up to see how fast memory is read


def decode_s(generate: Callable[[Sequence[Request]], object], requests: Sequence[Request]) -> float:
    """CPU seconds of the tokens after the first."""
    first = [Request(request.prompt, 1) for request in requests]
    return cpu_seconds(lambda: generate(requests)) - cpu_seconds(lambda: generate(first))


def main() -> None:
    ours = Ours(ADAPTERS)
    theirs = Generate([ours.arrays(i) for i in range(ADAPTERS)])
    paths = [adapter_path(i) for i in range(ADAPTERS)]
    alone = PROMPTS[:1]

    def one_by_one(requests: Sequence[Request]) -> list[list[int]]:
        outputs = []
        for number, request in enumerate(requests):
            theirs.use(number)
            outputs += theirs.generate([request])
        return outputs

    same = agreement(ours.generate(PROMPTS, paths), one_by_one(PROMPTS))
    print(f"the same tokens in {same:.0%} of outputs")
    assert same >= 0.7, "not the same model"
    numbers = torch.ones(SUM_NUMBERS)
    variants: dict[str, Callable[[], float]] = {
        "one": lambda: decode_s(lambda r: ours.generate(r, paths), alone),
        "one, generate": lambda: decode_s(one_by_one, alone),
        "base": lambda: decode_s(lambda r: ours.generate(r, [BASE_MODEL]), PROMPTS),
        "eight": lambda: decode_s(lambda r: ours.generate(r, paths), PROMPTS),
        "eight, generate": lambda: decode_s(one_by_one, PROMPTS),
        "memory": lambda: cpu_seconds(numbers.sum),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(ROUNDS + 1):
        for name, measure in variants.items():
            seconds = measure()
            if number:
                times[name].append(seconds)
    rows = [
        faster("one sequence with an adapter", times["one"], times["one, generate"], 1.5),
        faster("8 sequences, 8 adapters, against none", times["eight"], times["base"], 0.7),
        faster(
            "8 sequences, 8 adapters, against one by one",
            times["eight"],
            times["eight, generate"],
            3.3,
        ),
        bandwidth(ours, statistics.median(times["one"]), min(times["memory"])),
    ]
    report(rows)


def bandwidth(ours: Ours, seconds: float, sum_s: float) -> Row:
    """Weights of base and adapter over the time of a token, against the rate of a sum."""
    base = ours.sampler.engine.base
    weights = sum(s.in_features * s.out_features for s in base.shapes.values())
    adapter = ours.sampler.row(adapter_path(0)).parameter_count()
    rate = 4 * (weights + adapter) / (seconds / (TOKENS - 1)) / 1e9
    peak = 4 * SUM_NUMBERS / sum_s / 1e9
    return Row("one sequence, share of memory bandwidth", rate, peak, rate / peak, None, "GB/s")


if __name__ == "__main__":
    main()
