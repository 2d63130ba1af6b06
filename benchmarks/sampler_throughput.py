"""How many tokens does the sampler generate? Against transformers' generate with PEFT in batches of
8, and against transformers' own continuous batching on the base model. SmolLM2, rank 16 on all
linear layers and the head, one thread.

The baseline never waits for an arrival, and takes the likeliest tokens without telling logprobs.
"""

import statistics
from collections.abc import Sequence

from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.comparison import Row, faster, in_turn, report
from benchmarks.sampler_workloads import (
    Generate,
    Ours,
    Request,
    adapter_path,
    agreement,
    random_requests,
)
from sampler_service.jobs import BASE_MODEL

ROUNDS = 3
LEAST_AGREEMENT = 0.8  # of whole outputs, as greedy tokens at near ties go either way
ARRIVING = random_requests(32, (16, 256), (8, 128))
AT_ONCE = random_requests(32, (64, 64), (64, 64), seed=1)
BATCHED = random_requests(16, (64, 64), (32, 32), seed=2)


def check(ours: Sequence[list[int]], theirs: Sequence[list[int]]) -> None:
    share = agreement(ours, theirs)
    print(f"the same tokens in {share:.0%} of outputs")
    assert share >= LEAST_AGREEMENT, "not the same model"


def against_generate() -> list[Row]:
    ours = Ours(1)
    theirs = Generate([ours.arrays(0)])
    adapters = [adapter_path(0)]
    check(ours.generate(AT_ONCE, adapters), theirs.generate(AT_ONCE))  # and both are warm
    whole = in_turn({"arriving": lambda: ours.generate(ARRIVING, adapters, 10.0)}, 1, warm=True)
    quarter_s = statistics.median(whole["arriving"]) / 4
    times = in_turn(
        {
            "arriving": lambda: ours.generate(ARRIVING, adapters, quarter_s),
            "arriving, generate": lambda: theirs.generate(ARRIVING),
            "at once": lambda: ours.generate(AT_ONCE, adapters),
            "at once, generate": lambda: theirs.generate(AT_ONCE),
        },
        ROUNDS,
        warm=True,
    )
    return [
        faster(
            f"32 requests arriving, {tokens(ARRIVING)} tokens",
            times["arriving"],
            times["arriving, generate"],
            2.0,
        ),
        faster(
            f"32 requests at once, {tokens(AT_ONCE)} tokens",
            times["at once"],
            times["at once, generate"],
            1.2,
        ),
    ]


def tokens(requests: Sequence[Request]) -> int:
    return sum(request.output_tokens for request in requests)


def against_continuous_batching() -> Row:
    """The base model alone, since transformers' continuous batching knows no adapters."""
    ours = Ours(0)
    model = Generate([]).base
    model.set_attn_implementation("sdpa")
    config = GenerationConfig(
        max_new_tokens=BATCHED[0].output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    batching = ContinuousBatchingConfig(page_size=16, num_blocks=256, max_batch_tokens=1024)
    prompts = [request.prompt for request in BATCHED]

    def theirs() -> list[list[int]]:
        answers = model.generate_batch(
            prompts, config, continuous_batching_config=batching, warmup=False
        )
        in_order = sorted(answers.items(), key=lambda item: int(item[0].rpartition("_")[2]))
        return [answer.generated_tokens for _, answer in in_order]

    check(ours.generate(BATCHED, [BASE_MODEL]), theirs())
    times = in_turn(
        {"ours": lambda: ours.generate(BATCHED, [BASE_MODEL]), "theirs": theirs}, ROUNDS
    )
    name = f"continuous batching, base model, {tokens(BATCHED)} tokens"
    return faster(name, times["ours"], times["theirs"], 1.0)


def main() -> None:
    report([*against_generate(), against_continuous_batching()])


if __name__ == "__main__":
    main()
