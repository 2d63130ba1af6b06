"""Teaches a small model to multiply: supervised training over gRPC, samples before and after.

`make quickstart` starts both services on this machine, runs this script and stops them. To run it
against servers elsewhere, set MINT_BASE_URL (and MINT_API_KEY): python examples/quickstart.py
Given a file's name, such as curve.png, it draws the losses there. All is seeded: on processors of
one kind the numbers are the same each time.
"""

import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import mint
from mint import types

TRAINED, HELD_OUT = 100, 28  # products
STEPS, BATCH_SIZE = 24, 16
ADAM = types.AdamParams(learning_rate=3e-4)


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its answer, in words and in tokens."""

    question: str
    answer: str
    prompt: list[int]
    completion: list[int]  # ends in EOS, so that the model learns to stop

    @property
    def datum(self) -> types.Datum:
        """Each position predicts the next token; only the completion's count."""
        tokens = self.prompt + self.completion
        weights = [0] * len(self.prompt) + [1] * len(self.completion)
        return types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights[1:]},
        )


def make_examples(tokenizer: Any, count: int, seed: int = 0) -> list[Example]:
    """Different products of two factors from 2 to 20, in random order."""
    pairs = [(a, b) for a in range(2, 21) for b in range(2, 21)]
    examples = []
    for a, b in random.Random(seed).sample(pairs, count):
        question, answer = f"What is {a} * {b}?", str(a * b)
        prompt = tokenizer.encode(f"Question: {question}\nAnswer:")
        completion = tokenizer.encode(f" {answer}", add_special_tokens=False)
        examples.append(Example(question, answer, prompt, [*completion, tokenizer.eos_token_id]))
    return examples


def make_batches(examples: Sequence[Example], steps: int, size: int) -> Iterator[Sequence[Example]]:
    """Batches from one random order of the examples after another."""
    rng, queue = random.Random(1), list[Example]()
    for _ in range(steps):
        if len(queue) < size:
            queue = rng.sample(examples, len(examples))
        yield queue[:size]
        queue = queue[size:]


def train_step(client: mint.TrainingClient, batch: Sequence[Example]) -> float:
    """One step of AdamW; the loss before it, per token of an answer."""
    passed = client.forward_backward([example.datum for example in batch], "cross_entropy")
    stepped = client.optim_step(ADAM)  # sent at once: calls take effect in the order written
    loss = passed.result().metrics["loss:sum"] / answer_tokens(batch)
    stepped.result()
    return loss


def mean_logprob(client: mint.TrainingClient, examples: Sequence[Example]) -> float:
    """What the model gives the right answers, per token: 0 is certain."""
    output = client.forward([example.datum for example in examples], "cross_entropy").result()
    return -output.metrics["loss:sum"] / answer_tokens(examples)


def answer_tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.completion) for example in examples)


def ask(sampler: mint.SamplingClient, tokenizer: Any, examples: Sequence[Example]) -> list[str]:
    """The model's most likely answers."""
    params = types.SamplingParams(max_tokens=8, temperature=0)
    futures = [
        sampler.sample(types.ModelInput.from_ints(example.prompt), 1, params)
        for example in examples
    ]
    return [
        tokenizer.decode(future.result().sequences[0].tokens, skip_special_tokens=True).strip()
        for future in futures
    ]


def print_answers(title: str, examples: Sequence[Example], answers: Sequence[str]) -> int:
    """Returns how many are right."""
    right = sum(answer == example.answer for example, answer in zip(examples, answers, strict=True))
    print(f"\n{title}: {right} of {len(examples)} held-out answers right, such as")
    for example, answer in list(zip(examples, answers, strict=True))[:4]:
        print(f"  {example.question:18} {answer!r} (right: {example.answer})")
    return right


def draw(picture: Path, losses: Sequence[float], before: float, after: float) -> None:
    import matplotlib

    matplotlib.use("Agg")  # a file, no window
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, marker=".", label="training batch")
    axes.plot([1, len(losses) + 1], [-before, -after], "s", label="held out, before and after")
    axes.set(xlabel="step", ylabel="loss per answer token (nats)", ylim=(0, None))
    axes.legend()
    figure.savefig(picture, dpi=120)


def main() -> None:
    started = time.monotonic()
    service = mint.ServiceClient()
    client = service.create_lora_training_client(rank=16, seed=0)
    base_model = client.get_info().model_data.model_name
    tokenizer = client.get_tokenizer()
    examples = make_examples(tokenizer, TRAINED + HELD_OUT)
    trained, held_out = examples[:TRAINED], examples[TRAINED:]

    print(f"{base_model}: learning {TRAINED} products, {HELD_OUT} others held out")
    before = mean_logprob(client, held_out)
    untrained = service.create_sampling_client(base_model=base_model)
    right = [print_answers("before", held_out, ask(untrained, tokenizer, held_out))]

    print("\nloss per answer token")
    losses: list[float] = []
    batches = make_batches(trained, STEPS, BATCH_SIZE)
    for batch in tqdm(batches, total=STEPS, unit="step", disable=None, leave=False):
        losses.append(train_step(client, batch))
        tqdm.write(f"  step {len(losses):2}  {losses[-1]:.3f}  {'#' * round(24 * losses[-1])}")

    after = mean_logprob(client, held_out)
    sampler = client.save_weights_and_get_sampling_client(name="quickstart")
    right.append(print_answers("after", held_out, ask(sampler, tokenizer, held_out)))
    for picture in map(Path, sys.argv[1:2]):
        draw(picture, losses, before, after)
        print(f"\nloss curve: {picture}")
    print(
        "\n                                            before  after\n"
        f"mean logprob per token of held-out answers  {before:.3f}  {after:.3f}\n"
        f"held-out answers right                      {right[0]:6}  {right[1]:5}\n"
        f"training loss per answer token               {losses[0]:.3f}   {losses[-1]:.3f}\n"
        f"{time.monotonic() - started:.0f} s in all"
    )


if __name__ == "__main__":
    main()
