"""Frozen experts against transformers' own loop over them, and against themselves alone."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from mint_core.lora.products.packed import Packing
from mint_core.model import experts
from mint_core.model.experts import Experts, Grouping, is_experts

WIDTH, INNER, EXPERTS, PER_TOKEN, TOKENS = 48, 24, 6, 2, 61


def make_module(dtype: torch.dtype = torch.float32) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(hidden_size=WIDTH, moe_intermediate_size=INNER, num_experts=EXPERTS)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    module = Qwen3MoeExperts(config)
    with torch.no_grad():
        module.gate_up_proj.normal_(0.0, 0.3)
        module.down_proj.normal_(0.0, 0.3)
    return module.to(dtype).requires_grad_(False)


def make_inputs(tokens: int = TOKENS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, choices and weights; the last expert is nobody's."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, EXPERTS - 1, generator=generator)
    weights, index = scores.topk(PER_TOKEN)
    return torch.randn(tokens, WIDTH, generator=generator), index, weights


def gradients(
    run: Callable[..., Tensor], x: Tensor, index: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What comes out, and the gradients of inputs and weights for a fixed one of the output."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = run(x, index, weights)
    slope = torch.linspace(-1.0, 1.0, WIDTH, dtype=y.dtype).expand_as(y)
    dx, d_weights = torch.autograd.grad(y, (x, weights), slope)
    return y.detach(), dx, d_weights


def test_they_compute_what_transformers_does_forward_and_backward() -> None:
    inputs = make_inputs()
    ours = gradients(Experts(make_module()), *inputs)
    x, index, weights = inputs
    expected = gradients(make_module(torch.float64), x.double(), index, weights.double())
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


@given(chosen=st.lists(st.integers(0, TOKENS - 1), min_size=1, max_size=20, unique=True))
def test_a_token_is_the_same_bits_whoever_is_beside_it(chosen: list[int]) -> None:
    own, inputs = Experts(make_module()), make_inputs()
    whole = gradients(own, *inputs)
    part = gradients(own, *(each[chosen] for each in inputs))
    for mine, all_of_them in zip(part, whole, strict=True):
        assert torch.equal(mine, all_of_them[chosen])
    with torch.no_grad():
        assert torch.equal(own(*(each[chosen] for each in inputs)), whole[0][chosen])


@given(chosen=st.lists(st.integers(0, TOKENS - 1), min_size=1, max_size=9, unique=True))
def test_packed_ones_too(chosen: list[int]) -> None:
    own, inputs = Experts(make_module()), make_inputs()
    with torch.no_grad():
        plain = own(*inputs)
        own.pack(Packing(exact=True))
        assert own.module.down_proj.numel() == 0, "weights lie there twice"
        whole = own(*inputs)
        assert torch.equal(own(*(each[chosen] for each in inputs)), whole[chosen])
    assert (whole - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_chunks_of_few_tokens_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs()
    whole = gradients(Experts(make_module()), *inputs)
    monkeypatch.setattr(experts, "CHUNK_BYTES", 7 * PER_TOKEN * WIDTH * 4)
    sizes: list[int] = []
    monkeypatch.setattr(
        experts, "Grouping", lambda index, *rest: sizes.append(len(index)) or Grouping(index, *rest)
    )
    chunked = gradients(Experts(make_module()), *inputs)
    assert max(sizes) == 7
    assert all(torch.equal(a, b) for a, b in zip(chunked, whole, strict=True))


def test_nan_stays_with_its_token() -> None:
    own, (x, index, weights) = Experts(make_module()), make_inputs()
    expected = own(x, index, weights)
    x[0] = torch.nan
    found = own(x, index, weights)
    assert found[0].isnan().all()
    assert torch.equal(found[1:], expected[1:])


def test_other_layouts_are_not_taken_for_this_one() -> None:
    assert is_experts(make_module())
    assert not is_experts(nn.Linear(2, 2))
    config = GptOssConfig(num_local_experts=2, hidden_size=4, intermediate_size=4)
    assert not is_experts(GptOssExperts(config))
