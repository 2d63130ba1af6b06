"""The gated delta rule by `fla` against our own chunked form, which is held to the obvious one.

For a GPU with `fla`. Without a GPU they can be run in Triton's interpreter, on a copy of `fla` that
does not convert a loop's number (`i_t.to`): there that is a number of Python's.
"""

import itertools

import pytest
import torch
from torch import Tensor

from mint_core.model.mixers.delta_rule import recalled
from mint_core.model.mixers.runs import Runs

pytest.importorskip("fla", reason="flash-linear-attention is not installed")

from mint_core.model.mixers import delta_rule_fla
from mint_core.model.mixers.delta_rule_fla import recalled_by_fla

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
NEAR = {"rtol": 2e-2, "atol": 2e-2} if DEVICE.type == "cuda" else {"rtol": 1e-4, "atol": 1e-4}
HEADS, SIZE = 2, 32
SPANS = [(0, 1), (1, 70), (72, 137), (137, 269)]  # two rows are nobody's
ROWS = 271


def stream(seed: int) -> list[Tensor]:
    """Queries, keys, values, g and beta."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(ROWS, HEADS, *sizes, generator=generator)

    unit = [torch.nn.functional.normalize(draw(SIZE), dim=-1) for _ in range(2)]
    products = [x.to(DTYPE).float() for x in (*unit, draw(SIZE))]
    inputs = [*products, -draw().abs() * 0.3, draw().sigmoid()]
    return [x.to(DEVICE).requires_grad_() for x in inputs]


def by_fla(inputs: list[Tensor], runs: Runs, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    taken = [runs.one_by_one.take(x) for x in inputs]
    return recalled_by_fla(taken[:3], *taken[3:], runs, state, DTYPE)


def test_it_gives_what_our_own_form_gives_with_states_and_gradients() -> None:
    inputs, runs = stream(0), Runs(SPANS, ROWS, DEVICE)
    state = torch.randn(len(SPANS), HEADS, SIZE, SIZE, device=DEVICE)
    mine = torch.cat([torch.arange(*span) for span in SPANS]).to(DEVICE)
    with torch.no_grad():
        taken = [runs.chunks.take(x) for x in inputs]
        expected, last = recalled(taken[:3], *taken[3:], runs, state)
        found, after = by_fla(inputs, runs, state)
    assert last is not None
    assert after is not None
    torch.testing.assert_close(found[mine], expected[mine], **NEAR)
    torch.testing.assert_close(after, last, **NEAR)

    upstream = torch.randn(ROWS, HEADS * SIZE, device=DEVICE)
    taken = [runs.chunks.take(x) for x in inputs]
    ours = recalled(taken[:3], *taken[3:], runs, None)[0]
    theirs = by_fla(inputs, runs, None)[0]
    pairs = (torch.autograd.grad(x, inputs, upstream) for x in (theirs, ours))
    for ours_of, theirs_of in zip(*pairs, strict=True):
        torch.testing.assert_close(ours_of[mine], theirs_of[mine], **NEAR)


def test_a_run_has_the_same_bits_beside_whatever_neighbours() -> None:
    inputs = stream(1)
    upstream = torch.randn(ROWS, HEADS * SIZE, device=DEVICE)
    whole = by_fla(inputs, Runs(SPANS, ROWS, DEVICE), None)[0]
    gradients = torch.autograd.grad(whole, inputs, upstream)
    for start, stop in SPANS:
        own = [x[start:stop].detach().requires_grad_() for x in inputs]
        alone = by_fla(own, Runs([(0, stop - start)], stop - start, DEVICE), None)[0]
        assert torch.equal(alone, whole[start:stop])
        found = torch.autograd.grad(alone, own, upstream[start:stop])
        for mine, of_all in zip(found, gradients, strict=True):
            assert torch.equal(mine, of_all[start:stop])


def test_each_kernel_has_one_choice_of_blocks() -> None:
    import sys

    from triton.runtime.autotuner import Autotuner

    delta_rule_fla._kernels()
    kernels = itertools.chain.from_iterable(
        vars(module).values() for name, module in sys.modules.items() if name.startswith("fla.")
    )
    choices = [len(each.configs) for each in kernels if isinstance(each, Autotuner)]
    assert set(choices) == {1}
    assert len(choices) > 10
