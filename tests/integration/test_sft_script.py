"""Supervised fine-tuning from first line to last, as a user's script does it: both ways of making
data, training, saving, sampling. The environment alone says where the services are.
"""

import random
from collections.abc import Sequence
from typing import Any

import pytest

import mint
import mint.recipe as recipe
from mint import types
from tests.services import Services

ADAM = types.AdamParams(learning_rate=5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


@pytest.fixture(autouse=True)
def surroundings(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    services.point_environment_at_them(monkeypatch)


def encoded_sum(tokenizer: Any, a: int, b: int) -> types.Datum:
    """A sum by hand: the answer and the end of the text count, the question does not."""
    question = tokenizer.encode(f"{a} + {b} =", add_special_tokens=True)
    answer = [*tokenizer.encode(f" {a + b}", add_special_tokens=False), tokenizer.eos_token_id]
    tokens = question + answer
    weights = [0] * len(question) + [1] * len(answer)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens=tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights[1:]},
    )


def rendered_sum(renderer: Any, a: int, b: int) -> types.Datum:
    """A sum as a chat, by the model's renderer."""
    messages = [
        {"role": "user", "content": f"{a} + {b}"},
        {"role": "assistant", "content": str(a + b)},
    ]
    model_input, weights = renderer.build_supervised_example(messages)
    return recipe.datum_from_model_input_weights(model_input, weights, max_length=2048)


def train(client: mint.TrainingClient, data: Sequence[types.Datum], steps: int) -> list[float]:
    """The loss of each step, on batches drawn from the data."""
    rng, losses = random.Random(0), []
    for _ in range(steps):
        batch = rng.sample(data, 8)
        result = client.forward_backward(batch, loss_fn="cross_entropy").result()
        client.optim_step(ADAM).result()
        losses.append(result.metrics["loss:sum"])
    return losses


# The tiny model's chat template is plain ChatML, without Qwen3's thinking: the renderer warns.
@pytest.mark.filterwarnings("ignore::mint.recipe.renderers.RendererMismatchWarning")
def test_a_script_trains_saves_and_samples() -> None:
    with mint.ServiceClient() as service:
        client = service.create_lora_training_client(
            base_model="Qwen/Qwen3-0.6B", rank=16, train_mlp=True, train_attn=True, seed=3
        )
        tokenizer = client.get_tokenizer()
        name = recipe.get_recommended_renderer_name("Qwen/Qwen3-0.6B")
        renderer = recipe.renderers.get_renderer(name, tokenizer)
        pairs = [(a, b) for a in range(1, 5) for b in range(1, 5)]
        data = [encoded_sum(tokenizer, a, b) for a, b in pairs]
        data += [rendered_sum(renderer, a, b) for a, b in pairs]

        losses = train(client, data, steps=12)
        assert sum(losses[-3:]) < 0.8 * sum(losses[:3])

        saved = client.save_weights_and_get_sampling_client(name="sums")
        prompt = types.ModelInput.from_ints(tokenizer.encode("2 + 3 ="))
        params = types.SamplingParams(max_tokens=16, temperature=0.7)
        samples = saved.sample(prompt=prompt, sampling_params=params, num_samples=4)
        texts = [tokenizer.decode(sequence.tokens) for sequence in samples.sequences]
        assert len(texts) == 4
        assert all(1 <= len(sequence.tokens) <= 16 for sequence in samples.sequences)


def test_a_script_goes_on_from_its_saved_state() -> None:
    with mint.ServiceClient() as service:
        client = service.create_lora_training_client(rank=8, seed=4)
        data = [encoded_sum(client.get_tokenizer(), a, 7) for a in range(1, 10)]
        train(client, data, steps=3)
        path = client.save_state("halfway").result().path
        expected = train(client, data, steps=3)

        again = service.create_training_client_from_state_with_optimizer(path)
        assert train(again, data, steps=3) == expected  # bitwise: one engine thread on a CPU
