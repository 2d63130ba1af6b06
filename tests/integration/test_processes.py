"""Several clients, and a client that is killed."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import mint
from mint import types
from tests.services import Services


def batch(seed: int, count: int = 3) -> list[types.Datum]:
    rng = np.random.default_rng(seed)
    data = []
    for _ in range(count):
        tokens = rng.integers(3, 350, int(rng.integers(4, 40))).tolist()
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1] * (len(tokens) - 1)},
            )
        )
    return data


def train(run: mint.TrainingClient, seed: int, steps: int = 6) -> list[list[float]]:
    """Every logprob of every step."""
    history = []
    for step in range(steps):
        result = run.forward_backward(batch(100 * seed + step))
        run.optim_step(types.AdamParams(learning_rate=1e-2))
        outputs = result.result().loss_fn_outputs
        history.append([x for output in outputs for x in output["logprobs"].tolist()])
    return history


def saved_weights(store: Path, path: str) -> bytes:
    """The adapter file of a checkpoint, found by its run and name."""
    run, kind, name = path.removeprefix("mint://").split("/")
    (file,) = (store / run / kind / name).rglob("adapter_model.safetensors")
    return file.read_bytes()


def test_two_clients_at_the_same_time_each_bit_equal_to_training_alone(services: Services) -> None:
    def run_one(seed: int, name: str, results: dict[str, tuple[list[list[float]], bytes]]) -> None:
        with mint.ServiceClient(base_url=services.trainer) as client:
            run = client.create_lora_training_client(rank=4 + 4 * seed, seed=seed)
            history = train(run, seed)
            path = run.save_state("end").result().path
            results[name] = (history, saved_weights(services.store, path))

    results: dict[str, tuple[list[list[float]], bytes]] = {}
    for seed in (1, 2):
        run_one(seed, f"alone{seed}", results)
    threads = [
        threading.Thread(target=run_one, args=(seed, f"together{seed}", results)) for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        assert results[f"alone{seed}"] == results[f"together{seed}"]


KILLED_CLIENT = """
import os, sys, signal, mint
from tests.integration.test_processes import batch
from mint import types
client = mint.ServiceClient(base_url=sys.argv[1])
run = client.create_lora_training_client(rank=4, seed=9)
for step in range(2):
    run.forward_backward(batch(step)).result()
    run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
run.forward_backward(batch(2)).result()
print(run.training_run_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_run(services: Services) -> str:
    """The id of a run whose client died with a gradient pending."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED_CLIENT, services.trainer], capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    return done.stdout.strip()


def finish(run: mint.TrainingClient) -> list[float]:
    """The step that was due, and one more."""
    run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    outputs = run.forward(batch(3)).result().loss_fn_outputs
    return [x for output in outputs for x in output["logprobs"].tolist()]


def uninterrupted(service: mint.ServiceClient) -> list[float]:
    run = service.create_lora_training_client(rank=4, seed=9)
    for step in range(2):
        run.forward_backward(batch(step)).result()
        run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    run.forward_backward(batch(2)).result()
    return finish(run)


def test_a_killed_clients_run_is_opened_again_with_its_gradient(
    services: Services, service: mint.ServiceClient
) -> None:
    run = service.open_training_run(killed_run(services))
    info = service.get_training_run(run.training_run_id)
    assert (info.step, info.next_sequence, info.gradient_pending) == (2, 6, True)
    assert finish(run) == uninterrupted(service)


def test_the_gradient_of_a_killed_client_can_be_discarded(
    services: Services, service: mint.ServiceClient
) -> None:
    run = service.open_training_run(killed_run(services))
    run.discard_gradient().result()
    with pytest.raises(mint.APIStatusError, match="no gradient"):
        run.optim_step(types.AdamParams()).result()
    run.forward_backward(batch(2)).result()
    assert finish(run) == uninterrupted(service)


def test_opening_a_run_fences_the_earlier_client(service: mint.ServiceClient) -> None:
    first = service.create_lora_training_client(rank=2, seed=1)
    first.forward_backward(batch(1)).result()
    second = service.open_training_run(first.training_run_id)
    with pytest.raises(mint.MintError) as caught:
        first.optim_step(types.AdamParams()).result()
    assert caught.value.reason == "WRITER_FENCED"
    assert second.optim_step(types.AdamParams()).result().metrics["grad_norm:mean"] > 0


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")  # we adapt the head alone
def test_a_published_adapter_opens_in_peft_with_the_same_logits(
    services: Services, service: mint.ServiceClient
) -> None:
    # Here, so that the killed clients, which import this file, do not load them.
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = service.create_lora_training_client(rank=4, seed=3)
    train(run, 3, steps=3)
    path = run.save_weights_for_sampler("published").result().path
    name = path.removeprefix("mint://")
    (config,) = (services.store / name).rglob("adapter_config.json")
    base = AutoModelForCausalLM.from_pretrained(services.model)
    model = PeftModel.from_pretrained(base, config.parent)
    tokens = list(range(20, 60))
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = logprobs[torch.arange(39), torch.tensor(tokens[1:])].numpy()
    sampler = service.create_sampling_client(model_path=path)
    ours = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
    assert np.allclose(np.array(ours[1:]), expected, atol=1e-4)
    base_only = service.create_sampling_client(base_model=run.get_info().model_name)
    plain = base_only.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
    assert not np.allclose(np.array(plain[1:]), expected, atol=1e-2)
