"""What do shared prompts save? Sixteen samples of one prompt against sixteen requests that share
nothing, and a prompt that was seen before against its first time. SmolLM2, one thread.
"""

import itertools

import numpy as np

from benchmarks.comparison import cpu_seconds, faster, report
from benchmarks.sampler_workloads import END_TOKEN, FIRST_TOKEN, Ours, adapter_path

ROUNDS = 5
SAMPLES, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 512, 32
SUFFIX_TOKENS = 8  # that follow the shared 512


def main() -> None:
    ours = Ours(1)
    sampler, adapter = ours.sampler, adapter_path(0)
    seeds = itertools.count()

    def prompt(count: int) -> list[int]:
        """One that was never seen before."""
        rng = np.random.default_rng(next(seeds))
        tokens: list[int] = rng.integers(FIRST_TOKEN, END_TOKEN, count).tolist()
        return tokens

    def together() -> None:
        sampler.generate(
            prompt(PROMPT_TOKENS), adapter=adapter, num_samples=SAMPLES, max_tokens=OUTPUT_TOKENS
        )

    def apart() -> None:
        """Requests whose prompts differ from the first token on."""
        numbers = [
            sampler.submit(prompt(PROMPT_TOKENS), adapter=adapter, max_tokens=OUTPUT_TOKENS)
            for _ in range(SAMPLES)
        ]
        for number in numbers:
            sampler.answer(number)

    def first_token(tokens: list[int]) -> float:
        return cpu_seconds(lambda: sampler.generate(tokens, adapter=adapter, max_tokens=1))

    shared: list[float] = []
    unshared: list[float] = []
    again: list[float] = []
    first: list[float] = []
    for number in range(ROUNDS + 1):
        shared.append(cpu_seconds(together))
        unshared.append(cpu_seconds(apart))
        prefix = prompt(PROMPT_TOKENS)
        first.append(first_token(prefix + prompt(SUFFIX_TOKENS)))
        again.append(first_token(prefix + prompt(SUFFIX_TOKENS)))
        if not number:  # to warm up
            for times in (shared, unshared, first, again):
                times.clear()
    report(
        [
            faster(f"{SAMPLES} samples of {PROMPT_TOKENS} tokens", shared, unshared, 2.0),
            faster(f"{PROMPT_TOKENS} tokens seen before, to the first token", again, first, 5.0),
        ]
    )


if __name__ == "__main__":
    main()
