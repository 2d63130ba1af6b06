"""Data with k targets at each position, and what single losses read: taken or refused."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from mint_core.errors import InvalidRequest
from mintrpc.v1 import types_pb2
from tests.trainer_rpc import datum, tensor
from tests.unit.trainer_service.models import MODEL
from trainer_service.jobs import Cispo, CrossEntropy, Document, Gspo, ImportanceSampling, Loss, Ppo
from trainer_service.wire.datums import parse_datum

TOKENS = [5, 6, 7, 8]
TARGETS = tensor([[6, 9], [7, 9], [8, 9]], "int64")
RL = {
    "logprobs": tensor([-1, -2, -3], "float32"),
    "advantages": tensor([0, 1, -1], "float32"),
}


def parse(loss: Loss, **inputs: types_pb2.TensorData) -> Document:
    return parse_datum(datum(TOKENS, **inputs), "data[0]", loss, MODEL)


def refusal(loss: Loss, **inputs: types_pb2.TensorData) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(loss, **inputs)
    return caught.value


def test_k_targets_at_each_position() -> None:
    weights = tensor([[1, 0], [0, 0], [0.5, 0.5]], "float32")

    document = parse(CrossEntropy(), target_tokens=TARGETS, weights=weights)

    assert document.targets.tolist() == [[6, 9], [7, 9], [8, 9]]
    assert document.weights.shape == (3, 2)
    assert document.weighted.tolist() == [True, False, True]
    assert document.width == (2,)
    assert parse(CrossEntropy(), target_tokens=TARGETS).weights.tolist() == [[1, 1]] * 3


@pytest.mark.parametrize("dtype", [0, types_pb2.TENSOR_DTYPE_INT64, types_pb2.TENSOR_DTYPE_INT32])
def test_numbers_are_read_as_their_bytes_are(dtype: Any) -> None:
    loss = ImportanceSampling()
    typed = {
        "target_tokens": types_pb2.TensorData(dtype=dtype, int_values=[6, 7, 8]),
        "logprobs": types_pb2.TensorData(float_values=[-1, -2, -3]),
        "advantages": types_pb2.TensorData(dtype=1, shape=[3], float_values=[0, 1, -1]),
    }
    for given in (typed, {**RL, "target_tokens": tensor([6, 7, 8], "int32")}):
        same_as(parse(loss, **given), parse(loss, **RL))
    wide = types_pb2.TensorData(dtype=dtype, shape=[3, 2], int_values=[6, 9, 7, 9, 8, 9])
    document = parse(CrossEntropy(), target_tokens=wide)
    same_as(document, parse(CrossEntropy(), target_tokens=TARGETS))


def same_as(document: Document, other: Document) -> None:
    for each in fields(Document):
        one, two = getattr(document, each.name), getattr(other, each.name)
        assert (one is None) == (two is None)
        assert one is None or (one.dtype, one.tobytes()) == (two.dtype, two.tobytes())


@pytest.mark.parametrize(
    ("loss", "inputs", "field", "words"),
    [
        (
            CrossEntropy(),
            {"target_tokens": TARGETS, "weights": tensor([1, 1, 1], "float32")},
            "weights",
            r"shape [3] but `target_tokens` has [3, 2]; give one value per target",
        ),
        (
            CrossEntropy(),
            {"target_tokens": tensor([[6, 9], [7, 100], [8, 9]], "int64")},
            "target_tokens",
            "token id 100 at position 3",
        ),
        (
            CrossEntropy(),
            {"target_tokens": tensor([[6, 9], [7, 9]], "int64")},
            "target_tokens",
            r"shape [2, 2] but `target_tokens` has [3, 2]",
        ),
        (
            CrossEntropy(),
            {"target_tokens": TARGETS, "weights": tensor([[1, 1], [1, np.inf], [1, 1]], "float32")},
            "weights",
            "inf at position 3",
        ),
        (
            CrossEntropy(),
            {"target_tokens": types_pb2.TensorData(dtype=2, shape=[3, 0])},
            "target_tokens",
            r"shape [3, 0] but `model_input` has 3 tokens",
        ),
        (  # before the product of its lengths is made
            CrossEntropy(),
            {"target_tokens": types_pb2.TensorData(dtype=2, shape=[2**31, 0])},
            "target_tokens.values",
            "has 0 bytes, which is not 8 times the product of shape [2147483648, 0]",
        ),
        (ImportanceSampling(), {"target_tokens": TARGETS, **RL}, "target_tokens", "shape [3, 2]"),
        (
            Gspo(),
            {**RL, "sequence_ratio_mask": tensor([0, 0.5, 1], "float32")},
            "sequence_ratio_mask",
            "has 0.5 at position 1; give 1",
        ),
        (
            Ppo(),
            {**RL, "sequence_ratio_mask": tensor([0, 1, 1], "float32")},
            "sequence_ratio_mask",
            "this loss does not read",
        ),
        (
            ImportanceSampling(),
            {**RL, "clip_low_threshold": tensor([0, 1, 1], "float32")},
            "clip_low_threshold",
            "this loss does not read",
        ),
        (
            Ppo(),
            {**RL, "clip_low_threshold": tensor([0.5, 1.5, 1], "float32")},
            "clip_low_threshold",
            "clips to nothing at position 1",
        ),
        (
            Cispo(),
            {**RL, "clip_high_threshold": tensor([2, 2, 0.5], "float32")},
            "clip_high_threshold",
            "clips to nothing at position 2",
        ),
    ],
)
def test_bad_inputs(loss: Loss, inputs: dict[str, Any], field: str, words: str) -> None:
    error = refusal(loss, **inputs)

    assert error.metadata["field"] == f"data[0].loss_fn_inputs.{field}"
    assert words in error.message


def test_a_sequence_is_what_has_a_part_in_the_loss_unless_a_mask_says_otherwise() -> None:
    weights, mask = tensor([1, 1, 0], "float32"), tensor([1, 1, 0], "float32")

    def counted(**inputs: types_pb2.TensorData) -> list[float]:
        counted = parse(Gspo(), **RL, **inputs).ratio_mask
        assert counted is not None
        return list(counted.tolist())

    assert counted() == [0, 1, 1]
    assert counted(weights=weights) == [0, 1, 0]
    assert counted(sequence_ratio_mask=mask) == [1, 1, 0]
    assert parse(Ppo(), **RL).ratio_mask is None


def test_thresholds_of_single_tokens_stand_instead_of_the_losss() -> None:
    low = tensor([0.5, 0.6, 0.7], "float32")

    document = parse(Ppo(), **RL, clip_low_threshold=low)

    assert document.clip_low is not None
    assert document.clip_low.tolist() == pytest.approx([0.5, 0.6, 0.7])
    assert document.clip_high is None
