"""Sequences that are too long are refused by their length, before anything is queued."""

import dataclasses

import pytest

from mint_core.errors import InvalidRequest
from tests.trainer_rpc import datum
from tests.unit.trainer_service.models import MODEL
from trainer_service.jobs import CrossEntropy
from trainer_service.wire.datums import parse_datum


@pytest.mark.parametrize(
    ("memory_bound", "words"),
    [
        (False, "has 17 tokens but the context of tiny is 16; shorten the sequence"),
        (True, "has 17 tokens but the memory at hand holds 16 of one sequence; shorten or split"),
    ],
)
def test_a_sequence_that_cannot_fit_is_refused_with_the_remedy(
    memory_bound: bool, words: str
) -> None:
    model = dataclasses.replace(MODEL, memory_bound=memory_bound)
    parse_datum(datum(list(range(17))), "data[3]", CrossEntropy(), model)
    with pytest.raises(InvalidRequest) as caught:
        parse_datum(datum(list(range(18))), "data[3]", CrossEntropy(), model)

    assert caught.value.field == "data[3].model_input"
    assert words in caught.value.message
    assert caught.value.metadata["tokens"] == "17"
    assert caught.value.metadata["context_length"] == "16"
