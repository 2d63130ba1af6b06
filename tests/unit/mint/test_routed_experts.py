"""Experts in the client's types: bytes as a sampler tells them, or numbers."""

from typing import Any

import numpy as np
import pytest

import mint
from mint import types
from mintrpc.v1 import sampler_pb2

TOKENS = types.ModelInput.from_ints([5, 6])
TARGETS = {"target_tokens": [6, 7]}
CHOICES = [[[0, 5]], [[-1, -1]]]
WRITTEN = np.array([0, 5, 65535, 65535], "<u2").tobytes()


@pytest.mark.parametrize("given", [CHOICES, np.array(CHOICES), WRITTEN])
def test_a_datum_takes_numbers_and_bytes(given: Any) -> None:
    datum = types.Datum(TOKENS, TARGETS, routed_experts=given)
    assert datum.routed_experts == WRITTEN
    assert datum.to_proto().routed_experts == WRITTEN
    assert types.Datum(TOKENS, TARGETS).to_proto().routed_experts == b""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([[[0, 65536]]], "holds 65536; give numbers of experts"),
        ([[[-2, 1]]], "holds -2"),
        ([[[0.5, 1.0]]], "holds floats"),
    ],
)
def test_what_is_no_expert_is_refused_by_name(given: Any, words: str) -> None:
    with pytest.raises(mint.InvalidInputError, match=words) as caught:
        types.Datum(TOKENS, TARGETS, routed_experts=given)
    assert caught.value.field == "routed_experts"


def test_what_a_sampler_tells_is_what_a_datum_takes() -> None:
    sequence = sampler_pb2.SampledSequence(
        tokens=[7, 8], logprobs=[-1, -1], stop_reason="STOP_REASON_STOP", routed_experts=WRITTEN
    )
    answer = types.SampleResponse.from_proto(
        sampler_pb2.SampleResponse(sequences=[sequence], prompt_routed_experts=WRITTEN[:4])
    )
    (own,) = answer.sequences
    assert own.routed_experts_np.tolist() == [[0, 5], [65535, 65535]]
    datum = types.Datum(
        types.ModelInput.from_ints([5, 6, 7]),
        {"target_tokens": [6, 7, 8]},
        routed_experts=answer.prompt_routed_experts + own.routed_experts,
    )
    assert datum.routed_experts == WRITTEN[:4] + WRITTEN


def test_a_lora_config_says_whether_experts_are_trained() -> None:
    assert not types.LoraConfig().to_proto().HasField("train_experts")
    config = types.LoraConfig(train_experts=False)
    assert config.to_proto().HasField("train_experts")
    assert types.LoraConfig.from_proto(config.to_proto()) == config
    with pytest.raises(mint.InvalidInputError, match="`train_experts` is 'no'; give True or False"):
        types.LoraConfig(train_experts="no")  # type: ignore[arg-type]
    with pytest.raises(mint.InvalidInputError, match=r"stands instead of .* `train_experts`"):
        types.LoraConfig(train_experts=False, target_modules=["q_proj"])
