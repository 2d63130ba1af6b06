"""Linear layers that read one tensor: found in a pass, and computed together as one by one."""

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mint_core.lora.bank import AdapterBank, AdapterRow, Part
from mint_core.lora.groups import complete, read_together, watching
from mint_core.lora.layers import LoraContext, MultiLoraLinear, install
from mint_core.lora.segments import Segment
from mint_core.lora.spec import AdapterSpec
from mint_core.lora.targets import linear_shapes
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

WIDTH = 16
ROWS = 40
TRAINED = [("q", "k", "v", "o"), ("q", "v"), ("k",), ("o",), ("v", "o")]
PLACES = [(0, 9), (9, 14), (14, 22), (26, 30), (30, 40)]  # rows 22 to 26: the base alone


class Block(nn.Module):
    """Layers that read one tensor, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, 24)
        self.k = nn.Linear(WIDTH, 8)
        self.v = nn.Linear(WIDTH, 8)
        self.o = nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        joined = torch.cat([self.k(x), self.v(x), torch.zeros_like(q[..., :8])], dim=-1)
        return x + self.o(q * joined)


class Stack:
    """Two blocks with adapters, the same for a seed, and a pass through them."""

    def __init__(self, *, together: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(Block(), Block()).requires_grad_(False)
        shapes = linear_shapes(self.model)
        with torch.no_grad(), watching(self.model) as calls:
            self.model(torch.randn(4, WIDTH))
        self.groups = complete(shapes, read_together(calls) if together else ())
        self.context = LoraContext()
        install(self.model, self.context, self.groups)
        bank = AdapterBank(self.groups, torch.device("cpu"))
        self.rows = [self._row(bank, i, ends) for i, ends in enumerate(TRAINED)]
        self.segments = tuple(
            Segment(start, stop, row, accumulate=i != 4)
            for i, ((start, stop), row) in enumerate(zip(PLACES, self.rows, strict=True))
        )
        self.x = torch.randn(1, ROWS, WIDTH, generator=torch.Generator().manual_seed(1))

    def _row(self, bank: AdapterBank, seed: int, ends: tuple[str, ...]) -> AdapterRow:
        modules = tuple(f"{block}.{end}" for block in (0, 1) for end in ends)
        row = bank.add(AdapterSpec(rank=3, alpha=8.0, use_rslora=False, seed=0, modules=modules))
        generator = torch.Generator().manual_seed(seed)
        for module in modules:
            a, b = row.bank.matrices(row.part(Part.WEIGHTS), module)
            for matrix in (a[: row.spec.rank], b[:, : row.spec.rank]):
                matrix.copy_(torch.randn(matrix.shape, generator=generator))
        return row

    def run(self, *, recomputed: bool = False) -> tuple[Tensor, Tensor]:
        """Output and d (sum of squares) / d input; adds to the rows' gradients."""
        x = self.x.clone().requires_grad_()
        with self.context.applying(self.segments):
            y = checkpoint(self.model, x, use_reentrant=False) if recomputed else self.model(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        return y.detach(), dx

    def exported(self) -> list[Tensor]:
        """Gradients by name, one after the other."""
        return [
            torch.from_numpy(array)
            for row in self.rows
            for _, array in sorted(row.export(Part.GRADIENT).items())
        ]


@pytest.mark.parametrize(
    "make", [tiny_qwen3, tiny_qwen2, tiny_llama, tiny_mistral, tiny_gemma2, tiny_gemma3]
)
def test_projections_of_attention_and_of_the_mlp_are_found(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    groups = {group.modules for group in load_base(str(make(tmp_path))).groups}
    for i in range(2):
        layer = f"model.layers.{i}"
        assert tuple(f"{layer}.self_attn.{end}_proj" for end in "qkv") in groups
        assert tuple(f"{layer}.mlp.{end}_proj" for end in ("gate", "up")) in groups
        assert (f"{layer}.self_attn.o_proj",) in groups


def test_projections_that_are_one_already_stay_alone(tmp_path: Path) -> None:
    base = load_base(str(tiny_phi3(tmp_path)))
    assert [group.modules for group in base.groups] == [(name,) for name in base.shapes]


def test_layers_together_equal_layers_one_by_one() -> None:
    together, alone = Stack(together=True), Stack(together=False)
    assert [len(group.modules) for group in together.groups] == [3, 1, 3, 1]
    pairs = [*zip(together.run(), alone.run(), strict=True)]
    pairs += zip(together.exported(), alone.exported(), strict=True)
    for ours, expected in pairs:
        assert (ours - expected).norm() <= 1e-6 * expected.norm()
    assert any(gradient.any() for gradient in alone.exported())


def test_a_module_that_an_adapter_does_not_train_gets_no_gradient() -> None:
    stack = Stack(together=True)
    stack.run()
    for row, ends in zip(stack.rows[:4], TRAINED, strict=False):
        for group in stack.groups:
            for module in group.modules:
                gradients = row.bank.matrices(row.part(Part.GRADIENT), module)
                assert any(g.any() for g in gradients) == (module.split(".")[1] in ends)


def test_recomputed_layers_give_the_same_bits() -> None:
    kept, recomputed = Stack(together=True), Stack(together=True)
    for ours, expected in zip(recomputed.run(recomputed=True), kept.run(), strict=True):
        assert torch.equal(ours, expected)
    for ours, expected in zip(recomputed.exported(), kept.exported(), strict=True):
        assert torch.equal(ours, expected)


def test_a_pass_cut_short_leaves_nothing_to_the_next() -> None:
    stack, clean = Stack(together=True), Stack(together=True)
    first = stack.model[0]
    with pytest.raises(RuntimeError, match="size"), stack.context.applying(stack.segments):
        first.o(first.q(stack.x)[..., :3])  # k and v are never asked
    assert stack.context.waiting is None
    for ours, expected in zip(stack.run(), clean.run(), strict=True):
        assert torch.equal(ours, expected)


def test_a_layer_asked_with_another_tensor_reads_that() -> None:
    stack = Stack(together=True)
    first = stack.model[0]
    assert isinstance(first.k, MultiLoraLinear)
    other = stack.x + 1.0
    with torch.no_grad(), stack.context.applying(()):
        expected = nn.functional.linear(other, first.k.weight, first.k.bias)
        first.q(stack.x)
        torch.testing.assert_close(first.k(other), expected)
        torch.testing.assert_close(first.k(other), expected)  # also when asked twice


def test_what_a_group_computed_is_let_go_when_all_have_asked() -> None:
    stack = Stack(together=True)
    first = stack.model[0]
    with torch.no_grad(), stack.context.applying(()):
        kept = weakref.ref(first.q(stack.x))
        first.k(stack.x)
        first.v(stack.x)
        assert kept() is None


def test_weights_side_by_side_are_no_copies() -> None:
    stack = Stack(together=True)
    first = stack.model[0]
    storages = {layer.weight.untyped_storage().data_ptr() for layer in (first.q, first.k, first.v)}
    assert len(storages) == 1
    names = {name for name, _ in stack.model.named_parameters()}
    assert names == {
        f"{i}.{end}.{kind}" for i in (0, 1) for end in "qkvo" for kind in ("weight", "bias")
    }


def test_a_layer_whose_output_is_changed_in_place_stays_alone() -> None:
    class Clipping(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.q(x).clamp_(-1, 1)[..., :8] + self.k(x) * self.v(x)

    model = Clipping()
    with torch.no_grad(), watching(model) as calls:
        model(torch.randn(4, WIDTH))
    assert read_together(calls) == [("k", "v")]
