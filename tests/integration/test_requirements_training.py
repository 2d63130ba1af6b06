"""Requirements of supervised fine-tuning, by number: set-up, data, output, parameters.

12, 14, 38 to 40 and 47 are tests/parity/test_trainer_equals_peft.py; 13 and 48 are
tests/parity/test_fused_equals_alone.py; 19 to 25 are tests/unit/mint/recipe.
"""

import concurrent.futures
import subprocess
import sys

import numpy as np
import pytest

import mint
from mint import recipe, types
from tests.services import SERVED_NAME, Services

QUESTION, ANSWER = "Question: What is 3 * 4?\nAnswer:", " 12"


def make_datum(tokenizer: object, prompt: str = QUESTION, completion: str = ANSWER) -> types.Datum:
    """Prompt of weight 0, completion with EOS of weight 1, shifted: lists and integers."""
    head = tokenizer.encode(prompt, add_special_tokens=True)  # type: ignore[attr-defined]
    tail = tokenizer.encode(completion, add_special_tokens=False)  # type: ignore[attr-defined]
    tail.append(tokenizer.eos_token_id)  # type: ignore[attr-defined]
    tokens, weights = head + tail, [0] * len(head) + [1] * len(tail)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens=tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights[1:]},
    )


@pytest.fixture
def training(service: mint.ServiceClient) -> mint.TrainingClient:
    return service.create_lora_training_client(rank=8, seed=1)


def test_1_to_4_setup_as_on_the_page(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    services.point_environment_at_them(monkeypatch)
    client = mint.ServiceClient()
    training = client.create_lora_training_client(
        base_model="Qwen/Qwen3-0.6B", rank=16, train_mlp=True, train_attn=True, train_unembed=True
    )
    tokenizer = training.get_tokenizer()
    ids = tokenizer.encode("3 * 4", add_special_tokens=False)
    assert tokenizer.decode(ids) == "3 * 4"
    assert tokenizer.eos_token_id == 2
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False).startswith("<|im_start|>user\nhi")
    assert types.AdamParams(learning_rate=5e-5).learning_rate == 5e-5
    client.close()


def test_6_the_base_url_of_the_environment_is_used_and_an_argument_beats_it(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither: tests/unit/mint/test_environment.py."""
    services.point_environment_at_them(monkeypatch)
    with mint.ServiceClient() as client:
        assert client.get_server_capabilities().supported_models[0].model_name == SERVED_NAME
    monkeypatch.setenv("MINT_BASE_URL", "127.0.0.1:1")
    with mint.ServiceClient(base_url=services.trainer) as client:
        assert client.get_server_capabilities().supported_models[0].model_name == SERVED_NAME


def test_7_and_36_base_model_left_out(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    services.point_environment_at_them(monkeypatch)
    with mint.ServiceClient() as client:
        run = client.create_lora_training_client(rank=1)
        assert run.get_info().model_data.model_name == "Qwen/Qwen3-0.6B"
    monkeypatch.setenv("MINT_BASE_MODEL", "somebody/else")
    with (
        mint.ServiceClient() as client,
        pytest.raises(mint.NotFoundError, match="somebody/else") as caught,
    ):
        client.create_lora_training_client(rank=1)
    assert SERVED_NAME in str(caught.value)


def test_8_and_37_rank_left_out(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    services.point_environment_at_them(monkeypatch)
    with mint.ServiceClient() as client:
        assert client.create_lora_training_client().get_info().lora_rank == 16
    monkeypatch.setenv("MINT_LORA_RANK", "4")
    with mint.ServiceClient() as client:
        assert client.create_lora_training_client().get_info().lora_rank == 4
        for rank in (8, 64):
            assert client.create_lora_training_client(rank=rank).get_info().lora_rank == rank


def test_9_the_client_trains_without_torch(services: Services) -> None:
    script = (
        "import sys, mint\n"
        "from mint import types\n"
        f"client = mint.ServiceClient(base_url={services.trainer!r})\n"
        "run = client.create_lora_training_client(rank=2)\n"
        "datum = types.Datum(model_input=types.ModelInput.from_ints([5, 6, 7]),"
        " loss_fn_inputs={'target_tokens': [6, 7, 8], 'weights': [1, 1, 1]})\n"
        "run.forward_backward([datum]).result()\n"
        "print(run.optim_step(types.AdamParams()).result().metrics)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_10_calls_return_at_once(training: mint.TrainingClient) -> None:
    tokens = list(range(10, 410))
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={"target_tokens": tokens, "weights": [1] * 400},
    )
    futures = [training.forward_backward([datum]) for _ in range(20)]
    assert not futures[-1].done()
    assert all(isinstance(future, concurrent.futures.Future) for future in futures)
    assert len({future.result().metrics["loss:sum"] for future in futures}) == 1


def test_11_15_16_17_masking(training: mint.TrainingClient) -> None:
    tokenizer = training.get_tokenizer()
    datum = make_datum(tokenizer)
    weights = datum.loss_fn_inputs["weights"].tolist()
    assert set(datum.loss_fn_inputs) == {"target_tokens", "weights"}
    assert all(isinstance(weight, float) for weight in weights)
    completion = [*tokenizer.encode(ANSWER, add_special_tokens=False), tokenizer.eos_token_id]
    weighted = [
        t for t, w in zip(datum.loss_fn_inputs["target_tokens"].tolist(), weights, strict=True) if w
    ]
    assert weighted == completion  # from the last prompt position on, EOS included
    result = training.forward_backward([datum]).result()
    logprobs = result.loss_fn_outputs[0]["logprobs"].to_numpy()
    assert len(logprobs) == datum.model_input.length
    assert result.metrics["loss:sum"] == pytest.approx(
        -float(logprobs @ np.array(weights)), rel=1e-5
    )


def test_18_and_26_chat_template_and_renderer_give_data_that_train(
    training: mint.TrainingClient,
) -> None:
    tokenizer = training.get_tokenizer()
    messages = [
        {"role": "user", "content": "What is 3 * 4?"},
        {"role": "assistant", "content": "12"},
    ]
    templated = tokenizer.apply_chat_template(messages, return_dict=False)
    renderer = recipe.renderers.get_renderer("template", tokenizer)
    model_input, weights = renderer.build_supervised_example(messages)
    assert model_input.to_ints() == templated
    datum = recipe.datum_from_model_input_weights(model_input, weights, max_length=2048)
    assert set(datum.loss_fn_inputs) == {"target_tokens", "weights"}
    assert datum.model_input.length == len(templated) - 1
    result = training.forward_backward([datum], loss_fn="cross_entropy").result()
    assert result.metrics["loss:sum"] > 0


def test_27_to_29_output(training: mint.TrainingClient) -> None:
    data = [make_datum(training.get_tokenizer(), completion=f" {i}") for i in range(3)]
    result = training.forward_backward(data, loss_fn="cross_entropy").result()
    assert isinstance(result, types.ForwardBackwardResult)
    assert isinstance(result.loss_fn_outputs, list)
    lengths = [len(output["logprobs"].tolist()) for output in result.loss_fn_outputs]
    assert lengths == [datum.model_input.length for datum in data]
    assert isinstance(result.metrics, dict)
    assert not hasattr(result, "text")


def test_38_to_40_each_switch_freezes_its_group(service: mint.ServiceClient) -> None:
    for kept, part in (("attn", "self_attn"), ("mlp", ".mlp."), ("unembed", "lm_head")):
        switches = {f"train_{group}": group == kept for group in ("attn", "mlp", "unembed")}
        run = service.create_lora_training_client(rank=2, **switches)
        modules = service.get_training_run(run.training_run_id).trained_modules
        assert modules
        assert all(part in module for module in modules)


def test_41_loss_fn_left_out_is_cross_entropy(training: mint.TrainingClient) -> None:
    data = [make_datum(training.get_tokenizer())]
    left_out = training.forward(data).result()
    named = training.forward(data, loss_fn="cross_entropy").result()
    assert left_out.metrics["loss:sum"] == named.metrics["loss:sum"]


def test_42_to_45_adam_defaults() -> None:
    params = types.AdamParams()
    assert (params.learning_rate, params.betas, params.eps, params.weight_decay) == (
        5e-5,
        (0.9, 0.999),
        1e-8,
        0.0,
    )
    assert isinstance(params.betas, tuple)
    assert types.AdamParams(beta1=0.8, beta2=0.9).betas == (0.8, 0.9)


def test_46_the_loop_of_the_page_learns(training: mint.TrainingClient) -> None:
    adam_params = types.AdamParams(
        learning_rate=5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    data = [make_datum(training.get_tokenizer(), completion=f" {3 * i}") for i in range(4)]
    losses = []
    for _ in range(6):
        result = training.forward_backward(data, loss_fn="cross_entropy").result()
        step = training.optim_step(adam_params).result()
        losses.append(result.metrics["loss:sum"])
        assert step.metrics["grad_norm:mean"] > 0
    assert losses[-1] < 0.7 * losses[0]


def test_47_learning_rate_and_defaults_reach_the_step(service: mint.ServiceClient) -> None:
    """Adam's first step moves every number with a gradient by the learning rate."""
    runs = [service.create_lora_training_client(rank=2, seed=5) for _ in range(2)]
    data = [make_datum(runs[0].get_tokenizer())]
    for run, params in zip(
        runs, (types.AdamParams(), types.AdamParams(learning_rate=5e-5)), strict=True
    ):
        run.forward_backward(data).result()
        assert run.optim_step(params).result().metrics["learning_rate:mean"] == 5e-5
    results = [run.forward(data).result() for run in runs]
    assert results[0].metrics["loss:sum"] == results[1].metrics["loss:sum"]


def test_49_loss_fn_is_no_adam_parameter() -> None:
    with pytest.raises(TypeError, match="loss_fn"):
        types.AdamParams(loss_fn="cross_entropy")  # type: ignore[call-arg]
