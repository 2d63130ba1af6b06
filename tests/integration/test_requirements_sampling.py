"""Requirements of supervised fine-tuning, by number: sampling from what was trained."""

import numpy as np
import pytest

import mint
from mint import types
from tests.integration.test_requirements_training import make_datum


@pytest.fixture
def trained(service: mint.ServiceClient) -> mint.TrainingClient:
    training = service.create_lora_training_client(rank=8, seed=1)
    data = [make_datum(training.get_tokenizer())]
    for _ in range(8):
        training.forward_backward(data)
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return training


def completion_logprob(sampler: mint.SamplingClient, datum: types.Datum) -> float:
    """Logprob of the datum's completion under a sampler."""
    targets = datum.loss_fn_inputs["target_tokens"].tolist()
    tokens = [*datum.model_input.to_ints(), targets[-1]]
    logprobs = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
    assert logprobs[0] is None
    weights = datum.loss_fn_inputs["weights"].to_numpy()
    return float(np.array(logprobs[1:]) @ weights)


def test_30_to_34_sampling_as_on_the_page(trained: mint.TrainingClient) -> None:
    checkpoint = trained.save_weights_and_get_sampling_client(name="my-sft-v1")
    tokenizer = trained.get_tokenizer()
    prompt_ids = tokenizer.encode("3 * 7 =")
    samples = checkpoint.sample(
        prompt=types.ModelInput.from_ints(prompt_ids),
        sampling_params=types.SamplingParams(max_tokens=16, temperature=0.7),
        num_samples=4,
    )
    assert isinstance(samples.sequences, list)
    assert len(samples.sequences) == 4
    for sequence in samples.sequences:
        assert isinstance(tokenizer.decode(sequence.tokens), str)
        assert 1 <= len(sequence.tokens) <= 16
        assert len(sequence.logprobs) == len(sequence.tokens)
        assert sequence.stop_reason in {"stop", "length"}
    plain = samples.result()
    assert [s.tokens for s in plain.sequences] == [s.tokens for s in samples.sequences]
    assert not hasattr(plain, "result")
    again = trained.save_weights_and_get_sampling_client(name="my-sft-v1")  # a repeated name works
    assert again.compute_logprobs(types.ModelInput.from_ints(prompt_ids)).result()


def test_35_the_sampler_serves_the_trained_weights(
    service: mint.ServiceClient, trained: mint.TrainingClient
) -> None:
    datum = make_datum(trained.get_tokenizer())
    base = service.create_sampling_client(base_model="Qwen/Qwen3-0.6B")
    before = completion_logprob(base, datum)
    tuned = trained.save_weights_and_get_sampling_client(name="tuned")
    assert completion_logprob(tuned, datum) > before + 1.0
    assert completion_logprob(base, datum) == before


def test_35_earlier_sampling_clients_keep_their_weights(trained: mint.TrainingClient) -> None:
    datum = make_datum(trained.get_tokenizer())
    early = trained.save_weights_and_get_sampling_client(name="eval")
    before = completion_logprob(early, datum)
    trained.forward_backward([datum])
    trained.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    late = trained.save_weights_and_get_sampling_client(name="eval")
    assert completion_logprob(early, datum) == before
    assert completion_logprob(late, datum) != before


def test_50_both_ways_of_saving_serve_the_same_weights(
    service: mint.ServiceClient, trained: mint.TrainingClient
) -> None:
    path = trained.save_weights_for_sampler("saved").result().path
    assert path == f"mint://{trained.training_run_id}/sampler_weights/saved"
    by_path = service.create_sampling_client(model_path=path)
    direct = trained.save_weights_and_get_sampling_client(name="other")
    prompt = types.ModelInput.from_ints(trained.get_tokenizer().encode("Question: What is"))
    greedy = types.SamplingParams(max_tokens=12, temperature=0.0)
    answers = [c.sample(prompt, 1, greedy).result().sequences[0] for c in (by_path, direct)]
    assert answers[0].tokens == answers[1].tokens
    assert answers[0].logprobs == answers[1].logprobs
    scores = [c.compute_logprobs(prompt).result() for c in (by_path, direct)]
    assert scores[0] == scores[1]


def test_trainer_and_sampler_agree_on_logprobs(trained: mint.TrainingClient) -> None:
    """Design: trainer logprobs equal the sampler's `model_logprobs` to 1e-5 on average."""
    sampler = trained.save_weights_and_get_sampling_client()
    prompt = trained.get_tokenizer().encode("Question: What is 3 * 4?")
    params = types.SamplingParams(max_tokens=40, temperature=0.8, seed=3, stop=[])
    differences = []
    for sequence in (
        sampler.sample(types.ModelInput.from_ints(prompt), 8, params).result().sequences
    ):
        tokens = prompt + sequence.tokens
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={
                "target_tokens": tokens[1:],
                "weights": [0] * (len(prompt) - 1) + [1] * len(sequence.tokens),
            },
        )
        output = trained.forward([datum]).result().loss_fn_outputs[0]["logprobs"].to_numpy()
        ours = output[len(prompt) - 1 :]
        differences.extend(np.abs(ours - np.array(sequence.model_logprobs)))
    assert np.mean(differences) <= 1e-5
    assert np.max(differences) <= 1e-3
