"""The kernel that norms and turns heads against the same in torch. Without a GPU it runs in
Triton's interpreter.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mint_core.model.shortcuts import RmsNorm, rotated, turn
from tests.interpreted_kernels import DEVICE

from mint_core.model.fused.head_kernels import Kept, turned  # isort: skip  # after interpreted_kernels

TOKENS, HEADS, EPS = 5, 11, 1e-5


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def slowly(heads: Tensor, cosines: Tensor, sines: Tensor, weight: Tensor | None) -> Tensor:
    """As transformers does, in float32."""
    heads = heads.float()
    if weight is not None:
        heads = functional.rms_norm(heads, heads.shape[-1:], None, EPS) * weight.float()
    left, right = heads.chunk(2, dim=-1)
    swapped = torch.cat([-right, left], dim=-1)
    return heads * cosines[0, :, None].float() + swapped * sines[0, :, None].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("size", [16, 96])
def test_heads_are_normed_and_turned(size: int, normed: bool, dtype: torch.dtype) -> None:
    # As they come: columns of a wider tensor.
    heads = drawn(TOKENS, HEADS * size + 32, dtype=dtype)[:, : HEADS * size]
    heads = heads.view(TOKENS, HEADS, size)
    cosines, sines = (drawn(1, TOKENS + i, size, dtype=dtype)[:, i:] for i in (0, 1))
    weight = drawn(HEADS, size, dtype=dtype) if normed else None

    ours = turned(heads, *turn(cosines, sines), None if weight is None else (weight, EPS))

    expected = slowly(heads, cosines, sines, weight)
    limit = 1e-6 if dtype == torch.float32 else 2**-7  # the interpreter cuts
    assert ours.is_contiguous()
    assert (ours.float() - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("normed", [False, True])
def test_keys_and_values_go_to_their_slots(normed: bool) -> None:
    queries, others, size = 5, 3, 24
    heads = drawn(TOKENS, queries + 2 * others, size, dtype=torch.float32)
    turns = turn(*(drawn(1, TOKENS, size, dtype=torch.float32) for _ in range(2)))
    norm = (drawn(queries + others, size, dtype=torch.float32), EPS) if normed else None
    keys, values = (drawn(40 + i, others, size, dtype=torch.float32) for i in (0, 1))
    slots = torch.tensor([7, 0, 39, 12, 8], device=DEVICE)
    expected = turned(heads[:, : queries + others], *turns, norm)
    kept = keys.clone(), values[:40].clone()
    kept[0][slots], kept[1][slots] = expected[:, queries:], heads[:, queries + others :]

    ours = turned(heads, *turns, norm, kept=Kept(keys, values[:40], slots))

    assert torch.equal(ours, expected[:, :queries])
    assert torch.equal(keys, kept[0])
    assert torch.equal(values[:40], kept[1])


def test_the_form_on_a_cpu_is_the_same() -> None:
    heads, weight = drawn(TOKENS, HEADS, 16, dtype=torch.float32), torch.ones(HEADS, 16)
    cosines, sines = (drawn(1, TOKENS + i, 16, dtype=torch.float32)[:, i:] for i in (0, 1))
    ours = rotated(heads.cpu(), turn(cosines.cpu(), sines.cpu()), RmsNorm(weight, EPS))
    expected = slowly(heads.cpu(), cosines.cpu(), sines.cpu(), weight)
    torch.testing.assert_close(ours, expected)


def test_heads_of_another_size_are_refused() -> None:
    turns = turn(*(drawn(1, TOKENS, 8, dtype=torch.float32) for _ in range(2)))
    with pytest.raises(ValueError, match="does not turn"):
        turned(drawn(TOKENS, HEADS, 16, dtype=torch.float32), *turns)
