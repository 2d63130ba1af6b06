"""Reinforcement learning on policy: what the sampler reports is what the trainer recomputes, step
after step, while another tenant samples.
"""

import threading

import numpy as np
import pytest

import mint
from mint import types
from tests.models import VOCABULARY_SIZE
from tests.services import Services

PROMPTS, SAMPLES, NEW_TOKENS = 16, 16, 6
LIKED = VOCABULARY_SIZE // 2  # tokens from here on are rewarded
MOST_KL = 1e-5


class Neighbour:
    """Samples from the base model without end, on a thread of its own."""

    def __init__(self, services: Services) -> None:
        self._service = mint.ServiceClient(base_url=services.trainer)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.sampled = 0

    def _run(self) -> None:
        client = self._service.create_sampling_client()
        prompt = types.ModelInput.from_ints(list(range(40, 60)))
        params = types.SamplingParams(max_tokens=16, temperature=0.9)
        while not self._stop.is_set():
            self.sampled += len(client.sample(prompt, 4, params).result(60).sequences)

    def __enter__(self) -> "Neighbour":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._service.close()


def rewarded(
    prompt: list[int], answer: types.SampleResponse
) -> tuple[list[types.Datum], list[float]]:
    """A group's data, their advantages being rewards less the group's mean; and the rewards."""
    rewards = [float(np.mean(np.array(s.tokens) >= LIKED)) for s in answer.sequences]
    data = []
    for sequence, reward in zip(answer.sequences, rewards, strict=True):
        tokens = prompt + sequence.tokens
        before, count = len(prompt) - 1, len(sequence.tokens)
        advantages = [0.0] * before + [reward - float(np.mean(rewards))] * count
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={
                    "target_tokens": tokens[1:],
                    "logprobs": [0.0] * before + list(sequence.model_logprobs),
                    "advantages": advantages,
                },
            )
        )
    return data, rewards


def kl(data: list[types.Datum], result: types.ForwardBackwardOutput) -> float:
    """Of the sampler's policy from the trainer's, estimated without bias and never negative:
    the mean of exp(d) - 1 - d (Schulman 2020, "Approximating KL divergence", k3).
    """
    differences = []
    for datum, output in zip(data, result.loss_fn_outputs, strict=True):
        sampled = datum.loss_fn_inputs["logprobs"].to_numpy()
        differences.append((output["logprobs"].to_numpy() - sampled)[sampled != 0])
    d = np.concatenate(differences).astype(np.float64)
    return float(np.mean(np.expm1(d) - d))


def train(services: Services, steps: int) -> tuple[list[float], list[float]]:
    """The mean reward and the KL of each step."""
    prompts = np.random.default_rng(0).integers(3, VOCABULARY_SIZE, (PROMPTS, 8)).tolist()
    params = types.SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, stop=[])
    curve, kls = [], []
    with mint.ServiceClient(base_url=services.trainer) as service:
        training = service.create_lora_training_client(rank=8, seed=1)
        for _ in range(steps):
            sampler = training.save_weights_and_get_sampling_client()
            futures = [
                sampler.sample(types.ModelInput.from_ints(p), SAMPLES, params) for p in prompts
            ]
            data: list[types.Datum] = []
            rewards: list[float] = []
            for prompt, future in zip(prompts, futures, strict=True):
                more, theirs = rewarded(prompt, future.result(120))
                data += more
                rewards += theirs
            computed = training.forward_backward(data, loss_fn="importance_sampling")
            training.optim_step(types.AdamParams(learning_rate=3e-3)).result(120)
            kls.append(kl(data, computed.result(120)))
            curve.append(float(np.mean(rewards)))
    return curve, kls


def test_sampler_and_trainer_stay_on_one_policy(services: Services) -> None:
    with Neighbour(services) as neighbour:
        _, kls = train(services, 5)
    assert max(kls) <= MOST_KL
    assert neighbour.sampled > 0


@pytest.mark.slow
def test_they_stay_on_one_policy_for_fifty_steps(services: Services) -> None:
    with Neighbour(services) as neighbour:
        curve, kls = train(services, 50)
    assert max(kls) <= MOST_KL
    assert np.mean(curve[-5:]) > np.mean(curve[:5]) + 0.2
    assert neighbour.sampled > 0
