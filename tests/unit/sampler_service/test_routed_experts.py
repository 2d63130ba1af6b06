"""Requests that want to know which experts tokens went to."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mint_core.engine_host.pipe import RoutedShape
from mint_core.errors import InvalidRequest
from mintrpc.v1 import sampler_pb2
from sampler_service.engine.routed_rows import RoutedRows, stacked
from sampler_service.engine.sequences import PROMPT
from sampler_service.requests import parse_sample, parse_stream_sample
from tests.unit.sampler_service.test_requests import MODEL, sample

MIXTURE = replace(MODEL, routed=RoutedShape(layers=2, experts=6, per_token=2))


def rows(start: int, stop: int) -> np.ndarray:
    """Choices that tell their position."""
    return np.arange(start, stop, dtype=np.uint16)[:, None, None].repeat(2, 1).repeat(2, 2)


def test_they_are_asked_for_by_name() -> None:
    assert parse_sample(sample(include_routed_experts=True), MIXTURE).routed_experts
    assert not parse_sample(sample(), MIXTURE).routed_experts


def test_a_model_without_experts_has_none_to_tell() -> None:
    with pytest.raises(InvalidRequest, match="is set but tiny has no experts") as caught:
        parse_sample(sample(include_routed_experts=True), MODEL)
    assert caught.value.field == "include_routed_experts"


def test_an_answer_tells_so_many_and_no_more() -> None:
    large = replace(MIXTURE, context_length=2**20, routed=RoutedShape(64, 128, 8))
    request = sample(include_routed_experts=True, num_samples=2, max_tokens=32_767)
    parse_sample(request, large)
    request.sampling_params.max_tokens = 32_768
    with pytest.raises(InvalidRequest, match="at most 67108864 are told in an answer") as caught:
        parse_sample(request, large)
    assert caught.value.field == "include_routed_experts"


def test_a_stream_does_not_tell_them() -> None:
    request = sampler_pb2.StreamSampleRequest(sample=sample(include_routed_experts=True))
    with pytest.raises(InvalidRequest, match="`include_routed_experts` cannot be asked for in a"):
        parse_stream_sample(request, MIXTURE)


def test_what_is_computed_again_is_noted_once() -> None:
    noted = RoutedRows(prompt_tokens=5, samples=2)
    noted.note(PROMPT, 0, rows(0, 3))
    noted.note(PROMPT, 0, rows(0, 2))  # sent away, and begun anew
    noted.note(PROMPT, 2, rows(2, 4))
    for position in (4, 5):
        for sample_index in (0, 1):
            noted.note(sample_index, position, rows(position, position + 1))
    noted.note(0, 0, rows(0, 6))  # the same, by a sample that was sent away
    noted.note(0, 6, rows(6, 7))
    assert noted.prompt.tolist() == rows(0, 4).tolist()
    assert noted.sample(0).tolist() == rows(4, 7).tolist()
    assert noted.sample(1).tolist() == rows(4, 6).tolist()


def test_a_prompt_of_one_token_has_nothing_before_it() -> None:
    noted = RoutedRows(prompt_tokens=1, samples=1)
    noted.note(0, 0, rows(0, 1))
    assert noted.prompt.shape == (0, 2, 2)
    assert noted.sample(0).tolist() == rows(0, 1).tolist()


def test_layers_side_by_side() -> None:
    layers = [torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6], [7, 8]])]
    assert stacked(layers).tolist() == [[[1, 2], [5, 6]], [[3, 4], [7, 8]]]
