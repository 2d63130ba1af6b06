"""One user's script, as a process that may be killed: `python -m tests.harness.user NUMBER STEPS
LIFE HISTORY`. The next one finds its run and goes on. Address and key come from the environment.

Users with an even number train on fixed data, and save and load on the way; the others learn from
what they sample. All that they do follows from their number and the place in the script.
"""

import hashlib
import json
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mint
from mint import types
from tests.answers import exact
from tests.harness.history import Writer
from tests.training_load import batch

VOCABULARY_SIZE = 512  # of tests.models, which would import torch
LIMIT_S = 300.0
IN_FLIGHT = 5
PROMPT = [40, 41, 42, 43, 44, 45]
LIKED = VOCABULARY_SIZE // 2  # tokens from here on are rewarded
SFT = ("add", "add", "step")
RL = ("publish", "add", "step")


def script(number: int, steps: int) -> list[str]:
    """The kind of each place."""
    if number % 2:
        return [kind for _ in range(steps) for kind in RL] + ["save"]
    kinds: list[str] = []
    for step in range(steps):
        kinds += SFT
        if step in (1, 3):
            kinds.append("save" if step == 1 else "load")
    return [*kinds, "save"]


class User:
    def __init__(self, number: int, steps: int, history: Writer) -> None:
        self._number = number
        self._kinds = script(number, steps)
        self._history = history
        self._service = mint.ServiceClient(timeout=LIMIT_S)
        self._under_way: deque[tuple[int, Any]] = deque()

    def run(self, life: int) -> None:
        """All of the script that is left."""
        self._run = self._open()
        found = self._run.training_run
        run, step = found.training_run_id, found.step
        self._history.write("opened", life=life, run=run, next=found.next_sequence, step=step)
        for place in range(found.next_sequence, len(self._kinds) + 1):
            self._do(place, self._kinds[place - 1])
            while len(self._under_way) >= IN_FLIGHT:
                self._wait()
        while self._under_way:
            self._wait()
        self._service.close()

    def _open(self) -> mint.TrainingClient:
        mine = {"user": str(self._number)}
        runs = self._service.list_training_runs(metadata_filter=mine).training_runs
        if len(runs) > 1:
            self._history.write("failed", error=f"{len(runs)} runs")
        if runs:
            return self._service.open_training_run(runs[0].training_run_id)
        return self._service.create_lora_training_client(
            rank=2 + self._number, seed=self._number, user_metadata=mine
        )

    def _do(self, place: int, kind: str) -> None:
        data = self._data(place) if kind == "add" else []
        self._history.write("called", place=place, kind=kind)
        match kind:
            case "add":
                loss = "importance_sampling" if self._number % 2 else "cross_entropy"
                future: Any = self._run.forward_backward(data, loss_fn=loss)
            case "step":
                rate = 0.003 * (self._number + 1)
                future = self._run.optim_step(types.AdamParams(learning_rate=rate))
            case "publish":
                future = self._run.save_weights_for_sampler(f"at-{place}")
            case "save":
                future = self._run.save_state(f"at-{place}")
            case _:
                saved = self._kinds.index("save") + 1
                path = f"mint://{self._run.training_run_id}/weights/at-{saved}"
                future = self._run.load_state_with_optimizer(path)
        self._under_way.append((place, future))

    def _wait(self) -> None:
        place, future = self._under_way.popleft()
        answer = future.result(LIMIT_S)
        step = {"step": answer.step} if isinstance(answer, types.OptimStepResponse) else {}
        self._history.write("answered", place=place, answer=digest(answer), **step)

    def _data(self, place: int) -> list[types.Datum]:
        if self._number % 2 == 0:
            return batch(1000 * self._number + place, VOCABULARY_SIZE, [7, 30, 12])
        while self._under_way:  # the weights to sample from must be there
            self._wait()
        return self._sampled(place)

    def _sampled(self, place: int) -> list[types.Datum]:
        """Data from the policy that the place before has published."""
        path = f"mint://{self._run.training_run_id}/sampler_weights/at-{place - 1}"
        sampler = self._service.create_sampling_client(path)
        prompt = types.ModelInput.from_ints(PROMPT)
        params = types.SamplingParams(max_tokens=12, seed=place, temperature=1.0)
        samples = sampler.sample(prompt, 4, params).result(LIMIT_S).sequences
        scored = sampler.compute_logprobs(prompt).result(LIMIT_S)
        for sample in samples:
            self._drew(f"{place} {samples.index(sample)}", [sample.tokens, sample.logprobs])
        self._drew(f"{place} prompt", scored)
        rewards = [float(np.mean(np.array(sample.tokens) >= LIKED)) for sample in samples]
        mean = sum(rewards) / len(rewards)
        return [_datum(s, reward - mean) for s, reward in zip(samples, rewards, strict=True)]

    def _drew(self, key: str, content: Any) -> None:
        self._history.write("sampled", key=key, answer=_hash(json.dumps(content).encode()))


def _datum(sample: types.SampledSequence, advantage: float) -> types.Datum:
    tokens, before = PROMPT + sample.tokens, len(PROMPT) - 1
    return types.Datum(
        types.ModelInput.from_ints(tokens[:-1]),
        {
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * before + list(sample.model_logprobs or ()),
            "advantages": [0.0] * before + [advantage + 0.1] * len(sample.tokens),
        },
    )


def digest(answer: Any) -> str:
    """A text in which every bit of an answer shows that does not hang on names."""
    match answer:
        case types.ForwardBackwardOutput():
            logprobs = [output["logprobs"].to_numpy() for output in answer.loss_fn_outputs]
            metrics = json.dumps(exact(answer.metrics), sort_keys=True).encode()
            return _hash(*(each.tobytes() for each in logprobs), metrics)
        case types.OptimStepResponse():
            return json.dumps(answer.metrics, sort_keys=True)
    return type(answer).__name__


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def main(arguments: Sequence[str]) -> None:
    number, steps, life, file = arguments
    writer = Writer(Path(file), int(number))
    try:
        User(int(number), int(steps), writer).run(int(life))
    except mint.APIError as error:
        writer.write("failed", error=str(error))
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
