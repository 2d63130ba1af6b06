"""What several users do at the same time, and all that they were answered."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

import mint
from mint import types
from tests.answers import exact

LIMIT_S = 120.0
Answers = list[Any]
Watch = Callable[[int, int], None]  # told of a user, and how many answers it has


def batch(seed: int, vocabulary_size: int, lengths: Sequence[int]) -> list[types.Datum]:
    """Random sequences; none of them holds the token 13."""
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        tokens = rng.integers(14, vocabulary_size, length).tolist()
        given = {
            "target_tokens": rng.integers(14, vocabulary_size, length),
            "weights": rng.uniform(0.5, 1.5, length).astype(np.float32),
        }
        data.append(types.Datum(types.ModelInput.from_ints(tokens), given))
    return data


class Recorder:
    """Collects answers; a refusal is one too."""

    def __init__(self, watch: Callable[[int], None]) -> None:
        self.answers: Answers = []
        self._watch = watch
        self._futures: list[Any] = []

    def add(self, future: Any) -> None:
        self._futures.append(future)

    def wait(self) -> None:
        """Waits for all that were added, in order."""
        for future in self._futures:
            try:
                self.answers.append(_plain(future.result(LIMIT_S)))
            except mint.APIError as error:
                self.answers.append((type(error).__name__, error.reason))
            self._watch(len(self.answers))
        self._futures.clear()


def train(
    service: mint.ServiceClient, number: int, steps: int, vocabulary_size: int, watch: Watch
) -> tuple[Answers, str]:
    """One user's script. Returns all answers and the path of the final state."""
    run = service.create_lora_training_client(rank=2 + number, seed=number)
    recorder = Recorder(partial(watch, number))
    adam = types.AdamParams(learning_rate=0.01 * (number + 1))

    def data(seed: int, *lengths: int) -> list[types.Datum]:
        return batch(1000 * number + seed, vocabulary_size, lengths)

    saved = ""
    for step in range(steps):
        recorder.add(run.forward_backward(data(2 * step, 7, 30, 12)))
        if step % 3 == number % 3:
            recorder.add(run.forward(data(step, 9)))
        recorder.add(run.forward_backward(data(2 * step + 1, 20)))
        if step == 2:  # refused, and so is the step behind it
            recorder.add(run.forward_backward(batch(1, 10**6, [5])))
        if step == 4:
            recorder.add(run.discard_gradient())
            recorder.add(run.forward_backward(data(77, 5, 6)))
        recorder.add(run.optim_step(adam))
        if step % 2:
            recorder.wait()
        if step == 3:
            saved = run.save_state("middle").result(LIMIT_S).path
        if step == 6 and number % 2:
            recorder.add(run.load_state_with_optimizer(saved))
    recorder.wait()
    return recorder.answers, run.save_state("final").result(LIMIT_S).path


def train_all(
    address: str,
    count: int,
    steps: int,
    vocabulary_size: int,
    watch: Watch = lambda user, answers: None,
) -> list[tuple[Answers, str]]:
    """Several users at once. `watch` is called on their threads."""
    with mint.ServiceClient(base_url=address) as service, ThreadPoolExecutor(count) as users:
        works = [
            users.submit(train, service, number, steps, vocabulary_size, watch)
            for number in range(count)
        ]
        return [work.result() for work in works]


def _plain(answer: Any) -> Any:
    """What counts of an answer, in a form that compares."""
    if isinstance(answer, types.ForwardBackwardOutput):
        outputs = [output["logprobs"].to_numpy().tolist() for output in answer.loss_fn_outputs]
        return outputs, exact(answer.metrics)
    if isinstance(answer, types.OptimStepResponse):
        return exact(answer.metrics)
    return type(answer).__name__
