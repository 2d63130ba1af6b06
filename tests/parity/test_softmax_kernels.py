"""The softmax in kernels against that in torch. Without a GPU they run in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from mint_core.model.softmax import KernelSoftmax, PlainSoftmax
from tests.interpreted_kernels import DEVICE

from mint_core.model.fused.softmax_kernels import TILE  # isort: skip  # after interpreted_kernels

ROWS, VOCABULARY = 5, TILE + 900
CHOSEN = torch.tensor([4, 0, 2, 2], device=DEVICE)


def drawn(k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and slopes."""
    generator = torch.Generator().manual_seed(k)
    z = 4 * torch.randn(ROWS, VOCABULARY, generator=generator)
    z[1, 7] = 60.0  # a token that is nearly certain
    z[2, 9] = -torch.inf
    targets = torch.randint(VOCABULARY, (ROWS, k), generator=generator)
    targets[1, 0] = 7
    return z.to(DEVICE), targets.to(DEVICE), torch.randn(ROWS, k, generator=generator).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rows", [None, CHOSEN])
def test_logprobs_and_gradient_are_those_of_the_plain_one(
    k: int, rows: Tensor | None, dtype: torch.dtype
) -> None:
    z, targets, upstream = drawn(k)
    z = z.to(dtype)
    results = []
    for own, kind in ((z.clone(), KernelSoftmax), (z.float(), PlainSoftmax)):
        at_target = own.gather(1, targets)
        softmax = kind(own)
        logprobs = softmax.logprobs(at_target)
        chosen = (targets, upstream) if rows is None else (targets[rows], upstream[rows])
        results.append((logprobs, softmax.gradient(rows, *chosen)))

    (ours, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    limit = 1e-6 if dtype == torch.float32 else 2**-7  # the interpreter cuts
    difference = (gradient.float() - expected_gradient).abs()
    # A logarithm of about 20 is rounded to 2e-6, and so are all shares of its row.
    assert (difference <= limit * expected_gradient.abs() + 5e-6 * upstream.abs().max()).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_shows(broken: float) -> None:
    z, targets, _ = drawn(1)
    z[3, 5] = broken
    at_target = z.gather(1, targets)
    logprobs = KernelSoftmax(z).logprobs(at_target)
    assert logprobs.isfinite()[:, 0].tolist() == [True, True, True, False, True]
