"""Attention kernels against the formula written out, and packed documents against each alone."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mint_core.model.attention import LONG_DOCUMENT_TOKENS, PackedAttention, group_documents
from mint_core.model.attention_kernels import (
    MOST_BLOCK_QUERIES,
    Scores,
    causal_attention,
    long_causal_attention,
    varlen_attention,
)
from mint_core.model.stacked_attention import SHORT_TOKENS, filled_up

HEADS, KEY_HEADS, SIZE = 4, 2, 16
KINDS = [
    Scores(0.3),
    Scores(0.3, sliding_window=8),
    Scores(0.3, softcap=2.0),
    Scores(0.3, sliding_window=200, softcap=2.0),
]


def projections(tokens: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(h, tokens, SIZE, generator=generator) for h in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def by_the_book(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """The whole matrix of scores, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    key, value = (part.repeat_interleave(HEADS // KEY_HEADS, dim=0) for part in (key, value))
    products = query @ key.transpose(1, 2) * scores.scaling
    if scores.softcap is not None:
        products = torch.tanh(products / scores.softcap) * scores.softcap
    queries, keys = products.shape[1:]
    for row in range(queries):
        at = keys - queries + row
        products[:, row, at + 1 :] = -torch.inf
        if scores.sliding_window is not None:
            products[:, row, : max(0, at + 1 - scores.sliding_window)] = -torch.inf
    return products.softmax(-1) @ value


@pytest.mark.parametrize("scores", KINDS, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 30), (7, 30), (30, 30)])
def test_a_sequences_attention_is_the_formula(scores: Scores, queries: int, keys: int) -> None:
    query, key, value = projections(keys)
    ours = causal_attention(query[:, -queries:], key, value, scores)
    expected = by_the_book(query[:, -queries:], key, value, scores)
    assert (ours - expected).abs().max() < 1e-6


@pytest.mark.parametrize("scores", KINDS, ids=str)
def test_documents_in_stacks_and_their_gradients_are_each_alone_bitwise(scores: Scores) -> None:
    lengths = [9, 9, 30, 150, 31, 30, 1, 1, 9, 300]
    bounds = [0, *itertools.accumulate(lengths)]
    parts = [part.requires_grad_() for part in projections(bounds[-1])]
    upstream = torch.randn(HEADS, bounds[-1], SIZE, generator=torch.Generator().manual_seed(1))
    packed = PackedAttention(bounds).attend(0, *parts, scores)
    gradients = torch.autograd.grad((packed * upstream).sum(), parts)
    for start, stop in itertools.pairwise(bounds):
        own = [part.detach()[:, start:stop].requires_grad_() for part in parts]
        alone = PackedAttention([0, stop - start]).attend(0, *own, scores)
        assert torch.equal(packed[:, start:stop], alone)
        own_gradients = torch.autograd.grad((alone * upstream[:, start:stop]).sum(), own)
        for ours, theirs in zip(gradients, own_gradients, strict=True):
            assert torch.equal(ours[:, start:stop], theirs)


@pytest.mark.parametrize("scores", KINDS, ids=str)
@pytest.mark.parametrize("lengths", [(1,), (9, 30, 3, 9), (130, 7, 260, 130), (16, 16)])
def test_packed_documents_and_their_gradients_are_the_formula(
    lengths: tuple[int, ...], scores: Scores
) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    parts = [part.requires_grad_() for part in projections(bounds[-1])]
    upstream = torch.randn(HEADS, bounds[-1], SIZE)
    packed = PackedAttention(bounds).attend(0, *parts, scores)
    with torch.no_grad():
        assert torch.equal(PackedAttention(bounds).attend(0, *parts, scores), packed)
    by_document = [
        by_the_book(*(part[:, start:stop] for part in parts), scores)
        for start, stop in itertools.pairwise(bounds)
    ]
    expected = torch.cat(by_document, dim=1)
    assert (packed - expected).norm() <= 1e-6 * expected.norm()
    gradients = torch.autograd.grad((packed * upstream).sum(), parts)
    for ours, theirs in zip(
        gradients, torch.autograd.grad((expected * upstream).sum(), parts), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-6 * upstream.norm()


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_a_document_is_filled_up_by_little(lengths: list[int]) -> None:
    for tokens in lengths:
        assert tokens <= filled_up(tokens) <= max(4, 3 * tokens // 2)
        assert tokens <= SHORT_TOKENS or filled_up(tokens) == tokens


@pytest.mark.parametrize("scores", KINDS, ids=str)
def test_blocks_of_queries_and_their_gradients_are_the_formula(scores: Scores) -> None:
    parts = [part.requires_grad_() for part in projections(MOST_BLOCK_QUERIES + 90)]
    upstream = torch.randn(HEADS, MOST_BLOCK_QUERIES + 90, SIZE)
    gradients = [
        torch.autograd.grad((function(*parts, scores) * upstream).sum(), parts)
        for function in (causal_attention, by_the_book)
    ]
    for ours, expected in zip(*gradients, strict=True):
        assert (ours - expected).norm() < 1e-5 * expected.norm()


@given(lengths=st.lists(st.integers(1, 20), min_size=1), long_tokens=st.integers(1, 20))
def test_groups_hold_every_document_once_and_long_ones_alone(
    lengths: list[int], long_tokens: int
) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    groups = group_documents(bounds, lambda tokens: tokens < long_tokens)
    assert [s for g in groups for s in itertools.pairwise(g)] == list(itertools.pairwise(bounds))
    for group in groups:
        assert len(group) == 2 or all(b - a < long_tokens for a, b in itertools.pairwise(group))


@pytest.mark.parametrize("scores", KINDS, ids=str)
def test_a_long_document_gets_the_same_from_whatever_kernel_is_preferred(scores: Scores) -> None:
    parts = projections(40)
    assert torch.equal(long_causal_attention(*parts, scores), causal_attention(*parts, scores))


@pytest.mark.parametrize("scores", KINDS[:2], ids=str)
def test_the_kernel_for_many_documents_takes_what_it_is_given(scores: Scores) -> None:
    """Shapes alone: on the meta device nothing is computed."""
    parts = [part.to("meta", torch.bfloat16).requires_grad_() for part in projections(40)]
    bounds = torch.tensor([0, 10, 40], dtype=torch.int32, device="meta")
    output = varlen_attention(*parts, bounds, 30, scores)
    output.sum().backward()
    assert output.shape == parts[0].shape
    assert [part.grad is not None for part in parts] == [True] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("scores", KINDS, ids=str)
def test_kernels_of_an_accelerator_are_near_the_cpus(scores: Scores) -> None:
    """Short documents in one kernel, long ones one by one, forward and backward."""
    bounds = [0, 7, 100, 100 + LONG_DOCUMENT_TOKENS, 200 + LONG_DOCUMENT_TOKENS]
    parts = projections(bounds[-1])
    upstream = torch.randn(HEADS, bounds[-1], SIZE)
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        leaves = [part.to(device, dtype).requires_grad_() for part in parts]
        output = PackedAttention(bounds).attend(0, *leaves, scores)  # type: ignore[call-arg]
        gradients = torch.autograd.grad((output * upstream.to(device, dtype)).sum(), leaves)
        results.append([part.detach().float().cpu() for part in (output, *gradients)])
    for cpu, gpu in zip(*results, strict=True):
        assert (gpu - cpu).norm() < 2e-2 * cpu.norm()
