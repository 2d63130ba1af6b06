"""Sequenced requests: what is taken, and what is refused with which words."""

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from mint_core.errors import InvalidRequest, MintError, Unimplemented
from mintrpc.v1 import trainer_pb2, types_pb2
from tests.trainer_rpc import datum, model_input, tensor
from tests.unit.trainer_service.models import MODEL
from trainer_service.calls import (
    Call,
    Compute,
    Discard,
    Load,
    Refused,
    Save,
    Step,
)
from trainer_service.jobs import (
    AdamParams,
    Cispo,
    CrossEntropy,
    Dro,
    Gspo,
    ImportanceSampling,
    Loss,
    Ppo,
)
from trainer_service.wire.sequenced_requests import parse_call

PLACE: dict[str, Any] = {"training_run_id": "run-1", "sequence": 3, "writer_epoch": 1}
CE = types_pb2.CrossEntropy()
TOKENS = [5, 6, 7, 8]
RL = {
    "logprobs": tensor([-1, -2, -3], "float32"),
    "advantages": tensor([0, 1, -1], "float32"),
}


def parse(request: Any) -> Call:
    return parse_call(request, MODEL, most_targets=64)


def backward(*data: types_pb2.Datum, **options: Any) -> Call:
    options = PLACE | ({"cross_entropy": CE} if "loss" not in options else {}) | options
    options.update(options.pop("loss", {}))
    return parse(trainer_pb2.ForwardBackwardRequest(data=data or [datum(TOKENS)], **options))


def computed(call: Call) -> Compute:
    assert isinstance(call.work, Compute), call.work
    return call.work


def refusal(call: Call, kind: type[MintError] = InvalidRequest) -> MintError:
    assert isinstance(call.work, Refused), call.work
    assert isinstance(call.work.error, kind)
    return call.work.error


def test_a_batch_becomes_documents() -> None:
    work = computed(backward(datum(TOKENS, [0, 1, 0.5]), datum([1, 2])))

    first, second = work.documents
    assert first.tokens.tolist() == [5, 6, 7]
    assert first.targets.tolist() == [6, 7, 8]
    assert first.weights.tolist() == [0, 1, 0.5]
    assert second.weights.tolist() == [1]  # the default
    assert (work.loss, work.backward, work.weighted_only) == (CrossEntropy(), True, False)
    assert first.logprobs is None


def test_chunks_are_joined() -> None:
    example = datum(TOKENS)
    example.model_input.CopyFrom(
        types_pb2.ModelInput(chunks=[*model_input([5]).chunks, *model_input([6, 7]).chunks])
    )

    assert computed(backward(example)).documents[0].tokens.tolist() == [5, 6, 7]


def test_forward_is_not_backward() -> None:
    call = parse(
        trainer_pb2.ForwardRequest(
            **PLACE,
            data=[datum(TOKENS)],
            cross_entropy=CE,
            logprob_scope=trainer_pb2.LOGPROB_SCOPE_WEIGHTED,
        )
    )

    assert call.method == "Forward"
    assert not computed(call).backward
    assert computed(call).weighted_only


@pytest.mark.parametrize(
    ("given", "loss"),
    [
        ({"importance_sampling": types_pb2.ImportanceSampling()}, ImportanceSampling()),
        ({"ppo": types_pb2.Ppo()}, Ppo(0.8, 1.2)),
        ({"ppo": types_pb2.Ppo(clip_low_threshold=0.0)}, Ppo(0.0, 1.2)),
        ({"cispo": types_pb2.Cispo(clip_high_threshold=5)}, Cispo(0.8, 5)),
        ({"dro": types_pb2.Dro(beta=0.05)}, Dro(0.05)),
        ({"gspo": types_pb2.Gspo()}, Gspo(0.9997, 1.0004)),
        ({"gspo": types_pb2.Gspo(clip_low_threshold=0.5)}, Gspo(0.5, 1.0004)),
    ],
)
def test_losses_and_their_defaults(given: dict[str, Any], loss: Loss) -> None:
    work = computed(backward(datum(TOKENS, **RL), loss=given))

    assert work.loss == loss
    (document,) = work.documents
    assert document.logprobs is not None
    assert document.advantages is not None
    assert document.advantages.tolist() == [0, 1, -1]


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"loss": {}}, "loss_fn", "no loss is set"),
        ({"loss": {"dro": types_pb2.Dro()}}, "dro.beta", "is missing"),
        ({"loss": {"dro": types_pb2.Dro(beta=-1)}}, "dro.beta", "is -1"),
        (
            {"loss": {"ppo": types_pb2.Ppo(clip_low_threshold=2)}},
            "ppo.clip_high_threshold",
            "1.2, less than `clip_low_threshold` 2",
        ),
        ({"logprob_scope": 9}, "logprob_scope", "is 9"),
    ],
)
def test_bad_losses(options: dict[str, Any], field: str, words: str) -> None:
    error = refusal(backward(**options))

    assert error.metadata["field"] == field
    assert words in error.message


def without(name: str, example: types_pb2.Datum) -> types_pb2.Datum:
    del example.loss_fn_inputs[name]
    return example


def with_dtype(dtype: Any) -> types_pb2.TensorData:
    return types_pb2.TensorData(dtype=dtype, values=b"\0" * 24)


W = "data[1].loss_fn_inputs.weights"
T = "data[1].loss_fn_inputs.target_tokens"
IMAGE = types_pb2.ModelInputChunk(image=types_pb2.ImageChunk(data=b"x"))


@pytest.mark.parametrize(
    ("example", "field", "words"),
    [
        (
            datum([5, 100, 7]),
            "data[1].model_input",
            "token id 100 at position 1, outside the vocabulary",
        ),
        (datum([5, -1, 7]), "data[1].model_input", "token id -1"),
        (
            datum([5, 6, 7], [0, 0], target_tokens=tensor([6, -100], "int64")),
            T,
            "token id -100 at position 1",
        ),
        (datum([5, 6, 7], [1]), W, "shape [1] but `model_input` has 2 tokens"),
        (datum([5, 6, 7], [1, 2, 3]), W, "shape [3]"),
        (datum([5, 6, 7], target_tokens=tensor([6], "int64")), T, "shape [1]"),
        (without("target_tokens", datum([5, 6])), T, "lacks `target_tokens`"),
        (
            datum([5, 6], mask=tensor([1], "float32")),
            "data[1].loss_fn_inputs.mask",
            "has `mask`, which this loss does not read; it reads `target_tokens`, `weights`",
        ),
        (
            datum([5, 6], advantages=tensor([1], "float32")),
            "data[1].loss_fn_inputs.advantages",
            "does not read",
        ),
        (datum([5, 6, 7], [1, float("nan")]), W, "nan at position 1"),
        (datum([5, 6, 7], [float("inf"), 1]), W, "inf at position 0"),
        (
            datum([5, 6], weights=tensor([1], "int64")),
            f"{W}.dtype",
            "TENSOR_DTYPE_INT64 but must be TENSOR_DTYPE_FLOAT32",
        ),
        (
            datum([5, 6], target_tokens=tensor([6], "float32")),
            f"{T}.dtype",
            "must be TENSOR_DTYPE_INT64 or TENSOR_DTYPE_INT32",
        ),
        (
            datum([5, 6], target_tokens=types_pb2.TensorData(float_values=[6])),
            f"{T}.float_values",
            "takes `int_values`, or `values` as bytes",
        ),
        (
            datum([5, 6], weights=types_pb2.TensorData(dtype=1, values=bytes(4), float_values=[0])),
            f"{W}.float_values",
            "in `values` and in `float_values`; give them in one",
        ),
        (
            datum([5, 6], weights=types_pb2.TensorData(dtype=2, float_values=[1])),
            f"{W}.dtype",
            "TENSOR_DTYPE_INT64 but must be TENSOR_DTYPE_FLOAT32",
        ),
        (
            datum([5, 6], weights=types_pb2.TensorData(float_values=[1, 2], shape=[3])),
            f"{W}.float_values",
            "has 2 values, which is not the product of shape [3]",
        ),
        (
            datum([5, 6], weights=types_pb2.TensorData(float_values=[float("nan")])),
            W,
            "nan at position 0",
        ),
        (datum([5, 6], weights=with_dtype(0)), f"{W}.dtype", "UNSPECIFIED"),
        (datum([5, 6], weights=with_dtype(77)), f"{W}.dtype", "is 77"),
        (
            datum([5, 6], weights=types_pb2.TensorData(dtype=1, values=b"\0" * 5)),
            f"{W}.values",
            "5 bytes",
        ),
        (
            datum([5, 6], weights=types_pb2.TensorData(dtype=1, shape=[2], values=b"\0" * 4)),
            f"{W}.values",
            "shape [2]",
        ),
        (
            datum([5, 6, 7], weights=types_pb2.TensorData(dtype=1, shape=[2, 1], values=bytes(8))),
            W,
            "shape [2, 1]",
        ),
        (
            datum([5, 6], weights=types_pb2.TensorData(dtype=1, shape=[-1, -1], values=bytes(4))),
            f"{W}.values",
            "shape [-1, -1]",
        ),
        (
            datum(list(range(18))),
            "data[1].model_input",
            "17 tokens but the context of tiny is 16",
        ),
        (types_pb2.Datum(), "data[1].model_input", "has no tokens"),
        (
            types_pb2.Datum(model_input=types_pb2.ModelInput(chunks=[types_pb2.ModelInputChunk()])),
            "data[1].model_input.chunks[0]",
            "is empty",
        ),
    ],
)
def test_bad_data(example: types_pb2.Datum, field: str, words: str) -> None:
    error = refusal(backward(datum([1, 2]), example))

    assert error.metadata["field"] == field
    assert words in error.message


@pytest.mark.parametrize("k", [64, 65])
def test_no_more_targets_are_taken_at_a_position_than_a_tile_costs(k: int) -> None:
    targets = tensor([[9] * k] * 3, "int64")
    call = backward(datum(TOKENS), datum(TOKENS, target_tokens=targets))

    if k == 64:
        assert computed(call).documents[1].width == (64,)
    else:
        assert refusal(call).metadata == {"field": T, "max_targets": "64"}


def test_images_are_still_to_come() -> None:
    example = types_pb2.Datum(model_input=types_pb2.ModelInput(chunks=[IMAGE]))

    error = refusal(backward(example), Unimplemented)

    assert "data[0].model_input.chunks[0].image" in error.message


def test_a_loss_needs_its_inputs() -> None:
    error = refusal(backward(datum(TOKENS), loss={"ppo": types_pb2.Ppo()}))

    assert error.metadata["missing"] == "advantages, logprobs"


def test_a_batch_has_data() -> None:
    request = trainer_pb2.ForwardBackwardRequest(**PLACE, cross_entropy=CE)

    assert refusal(parse(request)).metadata["field"] == "data"


def test_adam_params_have_defaults() -> None:
    call = parse(trainer_pb2.OptimStepRequest(**PLACE))

    assert call.work == Step(adam_params=AdamParams(), backward_count=None)
    assert AdamParams() == AdamParams(
        learning_rate=5e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0, grad_clip_norm=0
    )


def test_zero_is_a_value_and_not_a_default() -> None:
    params = types_pb2.AdamParams(learning_rate=0, beta1=0)
    call = parse(trainer_pb2.OptimStepRequest(**PLACE, adam_params=params, backward_count=0))

    assert call.work == Step(adam_params=AdamParams(learning_rate=0, beta1=0), backward_count=0)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"learning_rate": -1e-3}, "`adam_params.learning_rate` is -0.001"),
        ({"learning_rate": float("inf")}, "`adam_params.learning_rate` is inf"),
        ({"beta1": 1.0}, "`adam_params.beta1` is 1 but must be in [0, 1)"),
        ({"beta2": -0.1}, "`adam_params.beta2` is -0.1"),
        ({"eps": float("nan")}, "`adam_params.eps` is nan"),
        ({"weight_decay": -1}, "`adam_params.weight_decay` is -1"),
        ({"grad_clip_norm": -1}, "`adam_params.grad_clip_norm` is -1"),
    ],
)
def test_bad_adam_params(params: dict[str, float], words: str) -> None:
    call = parse(trainer_pb2.OptimStepRequest(**PLACE, adam_params=types_pb2.AdamParams(**params)))

    assert words in refusal(call).message


def test_a_negative_count_of_backwards() -> None:
    error = refusal(parse(trainer_pb2.OptimStepRequest(**PLACE, backward_count=-1)))

    assert error.metadata["field"] == "backward_count"


def test_saves_and_loads() -> None:
    save = trainer_pb2.SaveStateRequest(
        **PLACE, name="a", overwrite=True, ttl=Duration(seconds=60), metadata={"k": "v"}
    )
    path = "mint://run-1/weights/a"

    assert parse(save).work == Save(
        kind="weights", name="a", overwrite=True, ttl_s=60, metadata={"k": "v"}
    )
    assert parse(trainer_pb2.SaveWeightsForSamplerRequest(**PLACE)).work == Save(
        kind="sampler_weights", name=None, ttl_s=None, metadata={}
    )
    assert parse(
        trainer_pb2.LoadStateRequest(**PLACE, path=path, with_optimizer=True)
    ).work == Load(path=path, with_optimizer=True)
    assert parse(trainer_pb2.DiscardGradientRequest(**PLACE)).work == Discard()


@pytest.mark.parametrize("name", ["", ".", "a/b", "a b", "-a", "a" * 129, "\N{SNOWMAN}"])
def test_bad_names(name: str) -> None:
    error = refusal(parse(trainer_pb2.SaveStateRequest(**PLACE, name=name)))

    assert error.metadata["field"] == "name"


@pytest.mark.parametrize(
    ("place", "field"),
    [
        ({"training_run_id": ""}, "training_run_id"),
        ({"sequence": 0}, "sequence"),
        ({"writer_epoch": 0}, "writer_epoch"),
        ({"acknowledged_sequence": -1}, "acknowledged_sequence"),
    ],
)
def test_a_call_without_a_place_is_refused_at_once(place: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(trainer_pb2.OptimStepRequest(**PLACE | place))

    assert caught.value.field == field


def test_attempts_of_one_call_have_one_hash() -> None:
    def hash_of(**options: Any) -> bytes:
        return parse(trainer_pb2.OptimStepRequest(**PLACE | options)).place.payload_hash

    assert hash_of() == hash_of(acknowledged_sequence=2, writer_epoch=7)
    assert hash_of() != hash_of(backward_count=0)
    assert hash_of() != parse(trainer_pb2.DiscardGradientRequest(**PLACE)).place.payload_hash
