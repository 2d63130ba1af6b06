"""Experts that a datum's tokens are told to go to, and those that a run would train: taken or
refused by the field's name.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mint_core.engine_host.pipe import RoutedShape
from mint_core.errors import InvalidRequest, MintError, Unimplemented
from mint_core.lora.spec import LoraRequest
from mintrpc.v1 import types_pb2
from tests.trainer_rpc import datum
from tests.unit.trainer_service.models import MODEL
from trainer_service.jobs import CrossEntropy, Document
from trainer_service.wire.datums import parse_datum
from trainer_service.wire.requests import parse_lora_config

MIXTURE = replace(MODEL, routed=RoutedShape(layers=2, experts=6, per_token=2))
CHOICES = [[[0, 5], [3, 1]], [[65535, 65535], [2, 4]], [[1, 0], [65535, 65535]]]  # of 3 tokens


def parse(given: bytes, model: Any = MIXTURE) -> Document:
    message = datum([5, 6, 7, 8])
    message.routed_experts = given
    return parse_datum(message, "data[0]", CrossEntropy(), model)


def written(choices: Any) -> bytes:
    return np.array(choices, "<u2").tobytes()


def test_choices_arrive_with_the_routers_own_marked() -> None:
    document = parse(written(CHOICES))
    assert document.routed is not None
    assert document.routed.dtype == np.int32
    expected = np.array(CHOICES)
    expected[expected == 65535] = -1
    assert document.routed.tolist() == expected.tolist()
    assert parse(b"").routed is None
    assert parse(b"", MODEL).routed is None


def changed(token: int, layer: int, *experts: int) -> bytes:
    choices = np.array(CHOICES)
    choices[token, layer] = experts
    return written(choices)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (written(CHOICES)[:-1], r"has 23 bytes but must have 24: 2 for each of 3 tokens, 2 layers"),
        (written([*CHOICES, *CHOICES]), r"has 48 bytes but must have 24"),
        (changed(2, 0, 1, 6), r"names an expert beyond 5, the last, for token 2 in layer 0"),
        (changed(0, 1, 3, 3), r"names an expert twice, for token 0 in layer 1"),
        (changed(1, 1, 65535, 2), r"has 65535 in some places alone, for token 1 in layer 1"),
    ],
)
def test_choices_that_cannot_be_are_refused_by_name(given: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        parse(given)
    assert caught.value.field == "data[0].routed_experts"


def test_a_model_without_experts_takes_none() -> None:
    with pytest.raises(InvalidRequest, match="is set but tiny has no experts; leave it out"):
        parse(written(CHOICES), MODEL)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "train_mlp"),
        ({"train_mlp": True}, "train_mlp"),
        ({"train_attn": False}, "train_mlp"),
        ({"train_experts": True}, "train_experts"),
        ({"train_experts": True, "train_mlp": False}, "train_experts"),
    ],
)
def test_experts_that_would_be_trained_are_refused_by_name(
    options: dict[str, bool], field: str
) -> None:
    with pytest.raises(Unimplemented) as caught:
        parse_lora_config(types_pb2.LoraConfig(rank=4, **options), MIXTURE)  # type: ignore[arg-type]
    assert caught.value.metadata["field"] == f"lora_config.{field}"
    assert "set `train_experts` to false to leave them out" in caught.value.message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"train_experts": False}, LoraRequest(rank=4)),
        ({"train_mlp": False}, LoraRequest(rank=4, train_mlp=False)),
        ({"target_modules": ["q_proj"]}, LoraRequest(rank=4, target_modules=("q_proj",))),
    ],
)
def test_experts_that_are_left_out_in_so_many_words_stay_frozen(
    options: dict[str, Any], expected: LoraRequest
) -> None:
    assert parse_lora_config(types_pb2.LoraConfig(rank=4, **options), MIXTURE) == expected


def test_a_model_without_experts_trains_none() -> None:
    frozen = types_pb2.LoraConfig(rank=4, train_experts=False)
    assert parse_lora_config(frozen, MODEL) == LoraRequest(rank=4)
    with pytest.raises(MintError, match=r"`lora_config\.train_experts` is true but tiny has"):
        parse_lora_config(types_pb2.LoraConfig(rank=4, train_experts=True), MODEL)


def test_target_modules_stand_instead_of_experts_too() -> None:
    both = types_pb2.LoraConfig(rank=4, train_experts=False, target_modules=["q_proj"])
    with pytest.raises(InvalidRequest, match=r"`lora_config\.train_experts` and .* are both set"):
        parse_lora_config(both, MIXTURE)
