"""One user's script, as a process that may be killed: `python -m tests.harness.user NUMBER STEPS
LIFE TIMELINE HISTORY`. The next one finds its run and goes on. Address and key come from the
environment.

Users with an even number train on fixed data, some of it in many crumbs, and save and load on the
way; the others learn from what they sample. All that they do follows from their number, the place
in the script and the timeline: on one that will be abandoned they train on other data.

A save that finds no room is made again, as another call, before the weights change. A process that
meets nobody at first, as servers may be away, ends, and the next one tries.
"""

import hashlib
import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mint
from mint import types
from tests.answers import exact
from tests.harness import history
from tests.training_load import batch

VOCABULARY_SIZE = 512  # of tests.models, which would import torch
LIMIT_S = 300.0
NOBODY_THERE = 75  # exit status
RETRY_S = 0.2  # after a save that found no room
IN_FLIGHT = 5
CRUMBS_IN_FLIGHT = 20
MANY = 300  # documents of one call
PROMPT = [40, 41, 42, 43, 44, 45]
LIKED = VOCABULARY_SIZE // 2  # tokens from here on are rewarded
SFT = ("add", "add", "step")
CRUMBS = ("many", *["crumb"] * 16, "step")
RL = ("publish", "add", "step")
ADDS = ("add", "many", "crumb")
SAVES = {"save": "weights", "publish": "sampler_weights"}


def script(number: int, steps: int) -> list[str]:
    """The kind of each place."""
    if number % 2:
        return [kind for _ in range(steps) for kind in RL] + ["save"]
    kinds: list[str] = []
    for step in range(steps):
        kinds += CRUMBS if step == 2 else SFT
        if step in (1, 3):
            kinds.append("save" if step == 1 else "load")
    return [*kinds, "save"]


def saved_names(number: int, steps: int) -> list[str]:
    """All that a script saves, in its order, as paths within the run."""
    kinds = enumerate(script(number, steps), start=1)
    return [f"{SAVES[kind]}/at-{place}" for place, kind in kinds if kind in SAVES]


@dataclass(frozen=True, slots=True)
class _Call:
    place: int
    sequence: int
    kind: str
    future: Any


class User:
    def __init__(self, number: int, steps: int, timeline: int, file: Path) -> None:
        self._number = number
        self._timeline = timeline
        self._file = file
        self._kinds = script(number, steps)
        self._history = history.Writer(file, number, timeline)
        self._service = mint.ServiceClient(timeout=LIMIT_S)
        self._under_way: deque[_Call] = deque()
        self._unsaved: deque[int] = deque()  # places of saves that are to be made again
        self._next = 1

    def run(self, life: int) -> None:
        """All of the script that is left."""
        started_s = time.monotonic()
        try:
            self._open(life)
            for place in range(self._found() + 1, len(self._kinds) + 1):
                self._do(place)
            self._settle_saves()
            self._wait_for(0)
        except mint.APIError as error:
            early = time.monotonic() - started_s < LIMIT_S  # who was there is waited for so long
            if early and isinstance(error, mint.APIConnectionError):
                sys.exit(NOBODY_THERE)
            self._history.write("failed", error=str(error))
            raise
        self._service.close()

    def _open(self, life: int) -> None:
        mine = {"user": str(self._number)}
        runs = self._service.list_training_runs(metadata_filter=mine).training_runs
        if len(runs) > 1:
            self._history.write("failed", error=f"{len(runs)} runs")
        if runs:
            self._run = self._service.open_training_run(runs[0].training_run_id)
        else:
            self._run = self._service.create_lora_training_client(
                rank=2 + self._number, seed=self._number, user_metadata=mine
            )
        found = self._run.training_run
        run, self._next = found.training_run_id, found.next_sequence
        self._history.write("opened", life=life, run=run, next=self._next, step=found.step)

    def _found(self) -> int:
        """The last place that has been executed. What may have been refused is to be made again."""
        called, answered = history.places(self._file, self._timeline)
        executed = {place for sequence, place in called.items() if sequence < self._next}
        saves = {place for place in executed if self._kinds[place - 1] in SAVES}
        self._unsaved.extend(sorted(saves - answered))
        return max(executed, default=0)

    def _do(self, place: int) -> None:
        kind = self._kinds[place - 1]
        if kind not in ADDS:
            self._settle_saves()
        self._call(place, kind, self._data(place, kind) if kind in ADDS else [])
        self._wait_for(CRUMBS_IN_FLIGHT if kind == "crumb" else IN_FLIGHT)

    def _call(self, place: int, kind: str, data: list[types.Datum]) -> None:
        self._history.write("called", place=place, sequence=self._next, kind=kind)
        match kind:
            case "step":
                rate = 0.003 * (self._number + 1)
                future: Any = self._run.optim_step(types.AdamParams(learning_rate=rate))
            case "publish":
                future = self._run.save_weights_for_sampler(f"at-{place}")
            case "save":
                future = self._run.save_state(f"at-{place}", overwrite=True)
            case "load":
                saved = self._kinds.index("save") + 1
                path = f"mint://{self._run.training_run_id}/weights/at-{saved}"
                future = self._run.load_state_with_optimizer(path)
            case _:
                loss = "importance_sampling" if self._number % 2 else "cross_entropy"
                future = self._run.forward_backward(data, loss_fn=loss)
        self._under_way.append(_Call(place, self._next, kind, future))
        self._next += 1

    def _settle_saves(self) -> None:
        """Waits for all saves, and makes again those that found no room."""
        while self._unsaved or any(call.kind in SAVES for call in self._under_way):
            if self._unsaved:
                time.sleep(RETRY_S)  # nothing tells of room
                place = self._unsaved.popleft()
                self._call(place, self._kinds[place - 1], [])
            self._wait()

    def _wait_for(self, most: int) -> None:
        """Waits until no more calls are under way than that."""
        while len(self._under_way) > most:
            self._wait()

    def _wait(self) -> None:
        call = self._under_way.popleft()
        about = {"place": call.place, "sequence": call.sequence}
        try:
            answer = call.future.result(LIMIT_S)
        except mint.RateLimitError as error:
            if call.kind not in SAVES:
                raise
            self._history.write("refused", **about, reason=error.reason)
            self._unsaved.append(call.place)
            return
        step = {"step": answer.step} if isinstance(answer, types.OptimStepResponse) else {}
        self._history.write("answered", **about, answer=digest(answer), **step)

    def _data(self, place: int, kind: str) -> list[types.Datum]:
        seed = 100_000 * self._timeline + 1000 * self._number + place
        if kind == "crumb":
            return batch(seed, VOCABULARY_SIZE, [1])
        if kind == "many":
            return batch(seed, VOCABULARY_SIZE, [1 + number % 3 for number in range(MANY)])
        if self._number % 2 == 0:
            return batch(seed, VOCABULARY_SIZE, [7, 30, 12])
        self._settle_saves()
        self._wait_for(0)  # the weights to sample from must be there
        return self._sampled(place, seed)

    def _sampled(self, place: int, seed: int) -> list[types.Datum]:
        """Data from the policy that the place before has published."""
        path = f"mint://{self._run.training_run_id}/sampler_weights/at-{place - 1}"
        sampler = self._service.create_sampling_client(path)
        prompt = types.ModelInput.from_ints(PROMPT)
        params = types.SamplingParams(max_tokens=12, seed=seed, temperature=1.0)
        samples = sampler.sample(prompt, 4, params).result(LIMIT_S).sequences
        scored = sampler.compute_logprobs(prompt).result(LIMIT_S)
        for sample in samples:
            self._drew(f"{seed} {samples.index(sample)}", [sample.tokens, sample.logprobs])
        self._drew(f"{seed} prompt", scored)
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
            shapes = json.dumps([each.shape for each in logprobs]).encode()
            return _hash(*(each.tobytes() for each in logprobs), shapes, metrics)
        case types.OptimStepResponse():
            return json.dumps(answer.metrics, sort_keys=True)
    return type(answer).__name__


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def main(arguments: Sequence[str]) -> None:
    number, steps, life, timeline = map(int, arguments[:4])
    User(number, steps, timeline, Path(arguments[4])).run(life)


if __name__ == "__main__":
    main(sys.argv[1:])
