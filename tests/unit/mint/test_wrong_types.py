"""What users give in another type than is meant: taken where it is clear, else refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import BatchEncoding

import mint
from mint import types
from mint.recipe import datum_from_model_input_weights
from tests.unit.mint.faulty_server import Server

ENCODED = BatchEncoding({"input_ids": [1, 2], "attention_mask": [1, 1]})


@pytest.mark.parametrize("tokens", [iter([1, 2]), (t for t in (1, 2)), range(1, 3), ENCODED])
def test_token_ids_are_taken_out_of_whatever_gives_them(tokens: Any) -> None:
    assert types.ModelInput.from_ints(tokens) == types.ModelInput.from_ints([1, 2])


def test_targets_are_taken_out_of_what_a_tokenizer_gives() -> None:
    datum = types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": ENCODED})
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [1, 2]


def test_a_list_of_a_tokenizers_keys_is_refused_with_the_way_out() -> None:
    with pytest.raises(mint.BadRequestError, match=r"`tokens` holds a tokenizer's keys.*input_ids"):
        types.ModelInput.from_ints(list(ENCODED))


INPUT = types.ModelInput.from_ints([1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: types.AdamParams(betas=0.9), "`betas` is a float; give a list of beta1"),
        (lambda: types.LoraConfig(use_rslora="yes"), "`use_rslora` is 'yes'; give True or False"),
        (lambda: types.LoraConfig(train_mlp="false"), "`train_mlp` is 'false'; give True"),
        (lambda: types.LoraConfig(train_attn=None), "`train_attn` is None; give True"),
        (lambda: types.LoraConfig(target_modules=5), "`target_modules` is a int; give a list"),
        (lambda: types.LoraConfig(target_modules=[5]), r"`target_modules\[0\]` is 5; give a text"),
        (lambda: types.Datum(INPUT, {"weights": 1.0}), r"`loss_fn_inputs.weights` is 1.0; give a"),
        (lambda: types.Datum(INPUT, {"weights": None}), r"`loss_fn_inputs.weights` is None; give"),
        (lambda: types.Datum(INPUT, {"weights": ENCODED}), r"weights` is a BatchEncoding; give a"),
        (lambda: types.Datum(INPUT, [1]), "`loss_fn_inputs` is a list; give a dict"),
        (lambda: types.ModelInput.from_ints(None), "`tokens` is None; give a list"),
        (lambda: types.ModelInput.from_ints({1, 2}), "`tokens` is a set; give a list"),
        (lambda: types.SamplingParams(stop=5).to_proto(), "`stop` is a int; give a list of texts"),
        (lambda: types.SamplingParams().copy(update=[5]), "`update` is a list; give a dict"),
        (lambda: datum_from_model_input_weights(INPUT, "a"), "`weights` is a str; give a list"),
        (lambda: datum_from_model_input_weights(INPUT, [1], "9"), "`max_length` is '9'; give a wh"),
    ],
)
def test_what_has_the_wrong_type_is_refused_by_its_name(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(mint.BadRequestError, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, s: t.forward_backward(None), "`data` is None; give a list of types.Datum"),
        (lambda t, s: t.forward(types.Datum(INPUT)), "`data` is a Datum; give a list"),
        (lambda t, s: t.forward([]), "`data` is empty"),
        (lambda t, s: t.forward([types.Datum(INPUT)], ["ppo"]), r"`loss_fn` is \['ppo'\]; it must"),
        (lambda t, s: t.forward([types.Datum(INPUT)], "ppo", 5), "`loss_fn_config` is a int; give"),
        (lambda t, s: t.forward_backward_custom([types.Datum(INPUT)], None), "`loss_fn` is None; "),
        (lambda t, s: t.save_state("a", overwrite="no"), "`overwrite` is 'no'; give True"),
        (lambda t, s: t.save_state("a", user_metadata=5), "`user_metadata` is a int; give a dict"),
        (lambda t, s: s.create_lora_training_client(isolated="no"), "`isolated` is 'no'; give"),
        (lambda t, s: s.delete_training_run("a", delete_checkpoints=0), "`delete_checkpoints` is "),
        (
            lambda t, s: s.create_sampling_client().sample(INPUT, 1, None, "yes"),
            "`include_prompt_logprobs` is 'yes'; give True",
        ),
        (
            lambda t, s: s.create_rest_client().upload_checkpoint(".", "a", with_optimizer="no"),
            "`with_optimizer` is 'no'; give True",
        ),
    ],
)
def test_what_has_the_wrong_type_is_refused_before_anything_is_sent(
    training: mint.TrainingClient,
    service: mint.ServiceClient,
    call: Callable[[Any, Any], object],
    message: str,
) -> None:
    with pytest.raises(mint.BadRequestError, match=message):
        call(training, service)


def test_a_batch_may_come_out_of_a_generator(
    server: Server, training: mint.TrainingClient, data: list[types.Datum]
) -> None:
    output = training.forward_backward(datum for datum in data * 3).result(20.0)  # type: ignore[arg-type]

    assert len(output.loss_fn_outputs) == 3
