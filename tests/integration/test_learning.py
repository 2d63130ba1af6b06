"""Real weights learn: the quickstart's task on SmolLM2, with fewer steps."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import mint
from examples import quickstart
from tests.services import running_services

MODEL = Path(__file__).parents[2] / ".models" / "SmolLM2-135M-Instruct"
STEPS, BATCH_SIZE, HELD_OUT = 8, 8, 8


@pytest.fixture
def smollm2(tmp_path: Path) -> Iterator[mint.ServiceClient]:
    if not (MODEL / "SOURCE.md").exists():
        pytest.skip("`make model` has not made the embedded model")
    with (
        running_services(MODEL, tmp_path, name="SmolLM2-135M-Instruct") as services,
        mint.ServiceClient(base_url=services.trainer) as service,
    ):
        yield service


def test_held_out_answers_become_likelier_and_the_loss_falls(smollm2: mint.ServiceClient) -> None:
    client = smollm2.create_lora_training_client(rank=16, seed=0)
    tokenizer = client.get_tokenizer()
    examples = quickstart.make_examples(tokenizer, quickstart.TRAINED + HELD_OUT)
    trained, held_out = examples[: quickstart.TRAINED], examples[quickstart.TRAINED :]
    before = quickstart.mean_logprob(client, held_out)

    batches = quickstart.make_batches(trained, STEPS, BATCH_SIZE)
    losses = [quickstart.train_step(client, batch) for batch in batches]

    assert quickstart.mean_logprob(client, held_out) > before + 1.0
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    sampler = client.save_weights_and_get_sampling_client(name="learned")
    answers = quickstart.ask(sampler, tokenizer, held_out[:4])
    assert all(answer.isdecimal() for answer in answers)  # before: '18 * 12 =', and so on
