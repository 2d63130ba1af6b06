"""Values in and out: what is accepted, what is refused and how, round trips."""

import copy
import json
import math
import pickle
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mint
from mint import types
from mint.types.samples import optional_logprobs
from mintrpc.v1 import sampler_pb2, trainer_pb2, types_pb2

PROMPT = types.ModelInput.from_ints([1, 2])


@pytest.mark.parametrize("weights", [[0, 1], np.array([0, 1]), torch.tensor([0, 1])])
def test_integer_weights_become_floats(weights: Any) -> None:
    datum = types.Datum(
        model_input=PROMPT, loss_fn_inputs={"target_tokens": [2, 3], "weights": weights}
    )

    assert datum.loss_fn_inputs["weights"].dtype == "float32"
    assert datum.loss_fn_inputs["weights"].tolist() == [0.0, 1.0]
    assert datum.loss_fn_inputs["target_tokens"].dtype == "int64"
    assert datum.loss_fn_inputs["weights"].to_torch().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_torch_floats_of_any_width_are_accepted(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0.5, -1.0], dtype=dtype, requires_grad=True)

    datum = types.Datum(PROMPT, {"advantages": tensor})

    assert datum.loss_fn_inputs["advantages"].tolist() == [0.5, -1.0]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weights", [True, False], "booleans"),
        ("weights", [0.5, math.nan], "nan at 1"),
        ("advantages", [math.inf, 0.0], "inf at 0"),
        ("weights", [[1.0], [1.0, 2.0]], "ragged"),
        ("weights", ["a", "b"], "text"),
        ("weights", [1.0, None], "objects"),
        ("target_tokens", [1.0, 2.0], "floats"),
    ],
)
def test_what_no_loss_can_read_is_refused_by_name(name: str, value: Any, message: str) -> None:
    with pytest.raises(mint.BadRequestError, match=message) as caught:
        types.Datum(PROMPT, {name: value})

    assert isinstance(caught.value, ValueError)
    assert caught.value.field == f"loss_fn_inputs.{name}"
    assert f"`loss_fn_inputs.{name}`" in str(caught.value)


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=8))
def test_floats_survive_the_wire(values: list[float]) -> None:
    tensor = types.TensorData(data=values, dtype="float32", shape=[len(values)])
    message = types_pb2.TensorData.FromString(tensor.to_proto().SerializeToString())

    assert types.TensorData.from_proto(message) == tensor
    assert types.TensorData.from_proto(message).tolist() == values


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=8))
def test_integers_survive_the_wire(values: list[int]) -> None:
    tensor = types.TensorData(data=values, dtype="int64")
    message = types_pb2.TensorData.FromString(tensor.to_proto().SerializeToString())

    assert types.TensorData.from_proto(message).data == values


def test_a_csr_form_is_kept_dense() -> None:
    data = types.TensorData(
        [1.0, 2.0, 3.0],
        "float32",
        [3, 4],
        sparse_crow_indices=[0, 2, 2, 3],
        sparse_col_indices=[3, 0, 1],
    )
    matrix = [[2, 0, 0, 1], [0, 0, 0, 0], [0, 3, 0, 0]]

    assert data.tolist() == matrix
    assert data == types.TensorData.from_torch_sparse(torch.tensor(matrix).float())
    assert data == types.TensorData.from_torch_sparse(torch.tensor(matrix).float().to_sparse())


@pytest.mark.parametrize(
    ("shape", "crow", "columns"),
    [
        (None, [0, 1], [0]),
        ([3], [0, 1], [0]),
        ([1, 2], [0, 1], None),
        ([1, 2], None, [0]),
        ([1, 2], [0, 2], [0]),
        ([1, 2], [0, 1], [2]),
        ([2, 2], [0, 1], [0]),
        ([2, 2], [0, 2, 1], [0]),
        ([1, 2], [0, 1], [0, 1]),
    ],
)
def test_csr_forms_that_do_not_fit_are_refused(shape: Any, crow: Any, columns: Any) -> None:
    with pytest.raises(mint.InvalidInputError, match="CSR"):
        types.TensorData([1.0], "float32", shape, crow, columns)


def test_the_norm_of_the_gradient_has_the_name_that_scripts_read() -> None:
    answer = trainer_pb2.OptimStepResponse(
        step=3, metrics={"grad_norm:mean": 2.5, "learning_rate:mean": 1e-4}
    )

    metrics = types.OptimStepResponse.from_proto(answer).metrics

    assert metrics["grad_norm:mean"] == metrics["unclipped_grad_l2:mean"] == 2.5
    assert metrics["learning_rate:mean"] == 1e-4


def test_tensor_data_keeps_its_shape_and_its_values_to_itself() -> None:
    source = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = types.TensorData.from_numpy(source)
    source[0, 0] = 9
    tensor.to_numpy()[0, 0] = 9

    assert tensor.shape == [2, 3]
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensor.data == [0, 1, 2, 3, 4, 5]
    assert types.TensorData(data=[1, 2, 3, 4], dtype="int64", shape=[2, 2]).tolist() == [
        [1, 2],
        [3, 4],
    ]
    assert types.TensorData.from_torch(torch.ones(2)) == types.TensorData([1.0, 1.0], "float32")
    with pytest.raises(mint.BadRequestError, match="shape"):
        types.TensorData(data=[1, 2, 3], dtype="int64", shape=[2, 2])


@pytest.mark.parametrize("tokens", [[1, 2, 3], np.array([1, 2, 3]), torch.tensor([1, 2, 3])])
def test_model_input_of_token_ids(tokens: Any) -> None:
    prompt = types.ModelInput.from_ints(tokens)

    assert prompt == types.ModelInput.from_ints(tokens=tokens)
    assert prompt.to_ints() == [1, 2, 3]
    assert prompt.length == 3
    assert prompt.append_int(4).to_ints() == [1, 2, 3, 4]
    assert prompt.append(types.EncodedTextChunk(tokens=[7])).to_ints() == [1, 2, 3, 7]
    assert types.ModelInput.empty().append_int(5).to_ints() == [5]
    assert prompt.length == 3
    assert types.ModelInput(chunks=[*prompt.chunks]).chunks == prompt.chunks


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([1, -2], r"tokens\[1\]. is -2"), ([2**31], "2147483648"), ([0.5], "floats"), ([[1]], "flat")],
)
def test_what_is_no_token_id_is_refused(tokens: Any, message: str) -> None:
    with pytest.raises(mint.BadRequestError, match=message):
        types.ModelInput.from_ints(tokens)


def test_images_have_their_place() -> None:
    image = types.ImageChunk(data=b"x", format="png", expected_tokens=4)
    prompt = PROMPT.append(image)

    assert prompt.length == 6
    assert prompt.to_proto().chunks[1].image.data == b"x"
    with pytest.raises(ValueError, match="image"):
        prompt.to_ints()


def test_values_pickle_and_copy() -> None:
    datum = types.Datum(PROMPT, {"target_tokens": [2, 3], "weights": [0, 1]})
    for value in (datum, PROMPT, types.AdamParams(beta1=0.5), types.SamplingParams(seed=3)):
        assert pickle.loads(pickle.dumps(value)) == value
        assert copy.deepcopy(value) == value


def test_adam_defaults_and_both_spellings_of_betas() -> None:
    params = types.AdamParams()

    assert (params.learning_rate, params.betas, params.eps) == (5e-5, (0.9, 0.999), 1e-8)
    assert (params.weight_decay, params.grad_clip_norm) == (0.0, 0.0)
    assert types.AdamParams(betas=(0.8, 0.9)) == types.AdamParams(beta1=0.8, beta2=0.9)
    assert types.AdamParams(beta2=0.95).betas == (0.9, 0.95)
    message = types.AdamParams(learning_rate=1e-4, betas=(0.9, 0.95), weight_decay=0.1).to_proto()
    assert (message.learning_rate, message.beta2, message.weight_decay) == (1e-4, 0.95, 0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_fn": "cross_entropy"}, TypeError, "forward_backward"),
        ({"momentum": 0.9}, TypeError, "`momentum` is not an option"),
        ({"betas": (0.9, 0.95), "beta1": 0.9}, ValueError, "both given"),
        ({"betas": (0.9,)}, ValueError, "1 entries"),
        ({"betas": (0.9, 1.0)}, ValueError, "`beta2` is 1.0"),
        ({"learning_rate": -1.0}, ValueError, "`learning_rate` is -1.0"),
        ({"learning_rate": math.nan}, ValueError, "finite"),
        ({"eps": "small"}, ValueError, "`eps` is 'small'"),
    ],
)
def test_adam_refuses_what_it_does_not_know(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        types.AdamParams(**options)


@pytest.mark.parametrize(
    ("params", "texts", "ids", "ignore_eos"),
    [
        (types.SamplingParams(), [], [], False),
        (types.SamplingParams(stop="\n"), ["\n"], [], False),
        (types.SamplingParams(stop=["a", "b"], stop_token_ids=[7]), ["a", "b"], [7], False),
        (types.SamplingParams(stop=[3, 4]), [], [3, 4], False),
        (types.SamplingParams(stop=[]), [], [], True),
        (types.SamplingParams(stop=[], stop_token_ids=[7]), [], [7], False),
        (types.SamplingParams(stop_token_ids=[7]), [], [7], False),
    ],
)
def test_stops(params: types.SamplingParams, texts: Any, ids: Any, ignore_eos: bool) -> None:
    message = params.to_proto()

    assert (list(message.stop), list(message.stop_token_ids)) == (texts, ids)
    assert message.ignore_eos is ignore_eos


def test_sampling_params_are_copied_with_changes() -> None:
    params = types.SamplingParams(max_tokens=16, temperature=0.7)
    message = params.model_copy(update={"seed": 5}).to_proto()

    assert (message.seed, message.max_tokens, message.temperature) == (5, 16, 0.7)
    assert (message.top_k, message.top_p) == (-1, 1.0)
    assert params.copy(update={"seed": 5}) == params.model_copy(update={"seed": 5})
    assert params.model_copy() == params
    assert not types.SamplingParams().to_proto().HasField("max_tokens")


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 1.5},
        {"seed": True},
        {"stop": ["a", 1]},
        {"stop": ""},
        {"stop": 7},
        {"seed": 2**63},
        {"min_p": "0.1"},
        {"presence_penalty": True},
        {"regex": 5},
        {"regex": "a", "json_schema": {}},
        {"json_schema": ["a"]},
        {"json_schema": {"const": math.nan}},
    ],
)
def test_bad_sampling_params_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(mint.BadRequestError, match=next(iter(options))):
        types.SamplingParams(**options).to_proto()


def test_a_schema_is_a_mapping_or_text() -> None:
    schema = {"type": "integer"}
    for form in (schema, json.dumps(schema), MappingProxyType(schema)):
        message = types.SamplingParams(json_schema=form).to_proto()
        assert json.loads(message.json_schema) == schema
    assert types.SamplingParams(regex="").to_proto().HasField("regex")  # for the server to refuse
    assert types.SamplingParams().to_proto().WhichOneof("constraint") is None


def test_lora_config_round_trip() -> None:
    config = types.LoraConfig(rank=8, seed=3, train_mlp=False, alpha=16.0, use_rslora=True)
    targets = types.LoraConfig(target_modules=["q_proj"])

    assert types.LoraConfig.from_proto(config.to_proto()) == config
    assert types.LoraConfig.from_proto(targets.to_proto()) == targets
    assert not targets.to_proto().HasField("train_mlp")
    for options in (
        {"train_mlp": False, "train_attn": False, "train_unembed": False},
        {"target_modules": ["q_proj"], "train_mlp": False},
        {"target_modules": "q_proj"},
    ):
        with pytest.raises(mint.BadRequestError):
            types.LoraConfig(**options)  # type: ignore[arg-type]


def test_sample_response_is_plain() -> None:
    topk = sampler_pb2.TopkLogprobs(token_ids=[4, 5], logprobs=[-0.5, -1.5])
    message = sampler_pb2.SampleResponse(
        sequences=[
            sampler_pb2.SampledSequence(
                tokens=[1, 2],
                logprobs=[-0.5, -1.0],
                model_logprobs=[-0.25, -1.5],
                stop_reason=sampler_pb2.STOP_REASON_LENGTH,
                topk_logprobs=[topk, topk],
            )
        ],
        prompt_logprobs=[math.nan, -2.0],
        topk_prompt_logprobs=[sampler_pb2.TopkLogprobs(), topk],
        target_prompt_logprobs=types.TensorData([[-1.0, math.nan]]).to_proto(),
        prompt_alt_tokens=sampler_pb2.PromptAltTokens(
            tokens=types.TensorData([[7, 8, 7]]).to_proto(),
            logprobs=types.TensorData([[-1.0, -2.0, -1.0]]).to_proto(),
        ),
        seed=9,
    )

    response = types.SampleResponse.from_proto(message)

    assert isinstance(response.sequences, list)
    assert response.sequences[0].tokens == [1, 2]
    assert response.sequences[0].logprobs == [-0.5, -1.0]
    assert response.sequences[0].stop_reason == "length"
    assert response.prompt_logprobs == [None, -2.0]
    assert response.topk_prompt_logprobs == [None, [(4, -0.5), (5, -1.5)]]
    assert response.target_prompt_logprobs == types.TensorData([[-1.0, math.nan]])
    assert response.prompt_alt_tokens is not None
    assert response.prompt_alt_tokens.tokens.tolist() == [[7, 8, 7]]
    assert response.prompt_alt_tokens.logprobs.tolist() == [[-1.0, -2.0, -1.0]]
    assert response.sequences[0].topk_logprobs == [[(4, -0.5), (5, -1.5)]] * 2
    assert optional_logprobs([math.nan]) == [None]

    assert response.sequences[0].tokens_np.tolist() == [1, 2]
    assert np.array_equal(response.prompt_logprobs_np, [math.nan, -2.0], equal_nan=True)  # type: ignore[arg-type]
    arrays = response.topk_prompt_logprobs_np
    assert arrays is not None
    assert arrays.token_ids.tolist() == [[0, 0], [4, 5]]
    assert arrays.logprobs.tolist() == [[-99999.0, -99999.0], [-0.5, -1.5]]
