"""Routers: rows that know no neighbours, choices that are told."""

import pytest
import torch
from torch import Tensor

from mint_core.engine_host.pipe import RoutedShape
from mint_core.lora.segments import Segment
from mint_core.model.attention import PackedAttention
from mint_core.model.base import LoadedBase
from mint_core.model.routing import ROUTERS_CHOICE
from tests.families.hybrids import HYBRID_MIXTURES
from tests.families.mixtures import EXPERTS, MIXTURES, PER_TOKEN
from tests.family import Family, params
from tests.models import load_base

TOKENS = 23


@pytest.fixture(scope="module", params=params([*MIXTURES, *HYBRID_MIXTURES]))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    family: Family = request.param
    return load_base(family.make(tmp_path_factory.mktemp("model")))


@torch.no_grad()
def run(base: LoadedBase, rows: range, told: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Hidden states, and choices [rows, L, k], of documents of one token."""
    tokens = torch.tensor(rows) * 37 % 512
    attention = PackedAttention(list(range(len(rows) + 1)))
    hidden = base.hidden(tokens, torch.tensor(rows) % 5, (Segment(0, len(rows)),), attention, told)
    assert base.routing is not None
    return hidden, torch.stack(base.routing.chosen, 1)


def test_what_a_model_says_of_its_experts(base: LoadedBase) -> None:
    routed = base.description.routed
    assert routed in (RoutedShape(2, EXPERTS, PER_TOKEN), RoutedShape(3, EXPERTS, PER_TOKEN))
    assert base.description.bitwise_reproducible
    names = base.description.linear_modules
    assert not [
        name for name in names if ".experts" in name or ".router" in name or "_gate." in f"{name}."
    ]


@pytest.mark.parametrize("rows", [range(4), range(3, 8), range(6, 23)])
def test_a_token_is_routed_alike_whoever_is_beside_it(base: LoadedBase, rows: range) -> None:
    whole, whole_choices = run(base, range(TOKENS))
    hidden, choices = run(base, rows)
    assert torch.equal(hidden, whole[rows])
    assert torch.equal(choices, whole_choices[rows])


def test_what_a_router_chose_may_be_told_again(base: LoadedBase) -> None:
    own, choices = run(base, range(TOKENS))
    assert len(choices.unique()) == EXPERTS
    hidden, told = run(base, range(TOKENS), choices.int())
    assert torch.equal(told, choices)
    assert torch.equal(hidden, own)


def test_tokens_go_where_they_are_told_and_others_where_they_went(base: LoadedBase) -> None:
    own, choices = run(base, range(TOKENS))
    told = torch.full_like(choices, ROUTERS_CHOICE)
    told[:9] = (choices[:9] + 1) % EXPERTS
    hidden, found = run(base, range(TOKENS), told)
    assert torch.equal(found[:9], told[:9])
    assert torch.equal(hidden[9:], own[9:])
    assert not torch.isclose(hidden[:9], own[:9]).all(1).any()
    again, _ = run(base, range(TOKENS))
    assert torch.equal(again, own), "what was told is forgotten"
