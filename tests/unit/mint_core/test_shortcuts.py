"""Direct forms of modules against the modules' own code, and what they are not given to."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mint_core.lora.groups import watching
from mint_core.lora.segments import Segment
from mint_core.model.attention import PackedAttention
from mint_core.model.loading import LoadedBase
from mint_core.model.shortcuts import (
    Attention,
    Mlp,
    RmsNorm,
    install_shortcuts,
)
from tests.models import (
    load_base,
    tiny_gemma2,
    tiny_gemma3,
    tiny_llama,
    tiny_mistral,
    tiny_phi3,
    tiny_qwen2,
    tiny_qwen3,
)

MAKERS = [
    *(tiny_qwen3, tiny_qwen2, tiny_llama, tiny_mistral),
    *(tiny_gemma2, tiny_gemma3, tiny_phi3),
]


def forms(base: LoadedBase) -> list[type]:
    return [type(module.__dict__.get("forward")) for module in base.model.modules()]


def run(base: LoadedBase) -> tuple[Tensor, Tensor]:
    """Hidden states of two documents, and the gradient of a sum of them at the embeddings."""
    embeddings = base.model.get_input_embeddings().weight  # type: ignore[operator,union-attr]
    embeddings.requires_grad_(True)
    places = torch.arange(12)
    segments = (Segment(0, 24),)
    attention = PackedAttention([0, 12, 24])
    hidden = base.hidden(places.repeat(2) * 7 % 512, places.repeat(2), segments, attention)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((hidden * weights).sum(), embeddings)
    embeddings.requires_grad_(False)
    return hidden.detach(), gradient


@pytest.mark.parametrize("make", MAKERS)
def test_direct_forms_give_what_the_model_does_forward_and_backward(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    base = load_base(str(make(tmp_path)))
    assert RmsNorm in forms(base)
    ours = run(base)
    for module in base.model.modules():
        module.__dict__.pop("forward", None)
    for mine, expected in zip(ours, run(base), strict=True):
        assert (mine - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("make", MAKERS[:-1])
def test_attention_and_mlp_of_the_usual_kind_have_direct_forms(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    found = forms(load_base(str(make(tmp_path))))
    assert found.count(Attention) == found.count(Mlp) == 2


def test_forms_of_shorter_types_are_as_near_to_float32_as_the_models_own_code(
    qwen3_folder: Path,
) -> None:
    exact = run(load_base(str(qwen3_folder)))
    base = load_base(str(qwen3_folder), dtype="bfloat16")
    assert {Attention, Mlp, RmsNorm} <= set(forms(base))
    ours = run(base)
    for module in base.model.modules():
        module.__dict__.pop("forward", None)
    for mine, theirs, expected in zip(ours, run(base), exact, strict=True):
        assert (mine - expected).norm() <= 1.2 * (theirs - expected).norm()


class Norm(nn.Module):
    """As models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, 16), requires_grad=False)
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class ClampedNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-10, 10))


class NormWithAnotherEpsilon(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 2 * self.eps))


class ShiftedNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01


@pytest.mark.parametrize(
    ("kind", "given"),
    [(Norm, True), (ClampedNorm, False), (NormWithAnotherEpsilon, False), (ShiftedNorm, False)],
)
def test_a_form_is_given_only_to_what_it_equals(kind: type[Norm], given: bool) -> None:
    module = kind()
    with torch.no_grad(), watching(module) as calls:
        module(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    install_shortcuts(calls, {})
    assert isinstance(module.__dict__.get("forward"), RmsNorm) is given
