"""A tenant who trains and samples, and can tell whether anything was other than in a quiet hour."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mint
from mint import types
from tests.answers import exact


@dataclass(frozen=True, slots=True)
class Neighbour:
    """With both services to itself, or so it seems."""

    trainer: mint.ServiceClient
    sampler: mint.SamplingClient

    def work(self, timed: Callable[[str, float], None] = lambda what, seconds: None) -> list[Any]:
        """A few steps of a new run and some samples: every number that came of it."""
        run = self.trainer.create_lora_training_client(rank=4, seed=1)
        seen: list[Any] = []
        for step in range(4):
            started_s = time.perf_counter()
            computed = run.forward_backward(_batch(*range(step + 1, step + 21)))
            stepped = run.optim_step(types.AdamParams(learning_rate=0.01))
            output = computed.result(120)
            seen += [exact(output.metrics), exact(stepped.result(120).metrics)]
            seen += [each["logprobs"].tolist() for each in output.loss_fn_outputs]
            timed("step", time.perf_counter() - started_s)
            started_s = time.perf_counter()
            params = types.SamplingParams(max_tokens=12, seed=step)
            prompt = types.ModelInput.from_ints([5, 6, 7, step + 1])
            (sequence,) = self.sampler.sample(prompt, 1, params).result(120).sequences
            seen += [sequence.tokens, sequence.logprobs]
            timed("sample", time.perf_counter() - started_s)
        self.trainer.create_rest_client().delete_training_run(run.training_run_id).result(120)
        return seen


def _batch(*tokens: int) -> list[types.Datum]:
    inputs = {"target_tokens": list(tokens[1:]), "weights": [1] * (len(tokens) - 1)}
    return [types.Datum(types.ModelInput.from_ints(tokens[:-1]), inputs)]
