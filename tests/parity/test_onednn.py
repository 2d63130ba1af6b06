"""Products by oneDNN, asked for on whatever processor this is, as those do whose widest vectors MKL
leaves alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from mint_core.lora.products import onednn
from mint_core.lora.segments import MIN_ROWS
from mint_core.lora.spec import LoraRequest
from tests.engines_in_process import EngineRun, for_loss, make_documents, make_engine
from tests.families import named
from tests.parity import test_fused_equals_alone, test_layer_kinds_trainer
from tests.parity.peft_oracle import PeftTrainer
from tests.parity.test_trainer_equals_peft import check_gradient
from trainer_service.engine.engine import Engine
from trainer_service.jobs import Ppo

FAMILIES = ["Qwen 3", "OLMo", "Qwen 3 MoE", "Qwen 3.5 of text"]  # OLMo clips in place
pytestmark = [
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here"),
    pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning"),
]


@contextmanager
def asked_for() -> Iterator[None]:
    """Of every matrix that is loaded meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "LEAST_NUMBERS", 1)
        patch.setattr(onednn, "_has_what_mkl_leaves", lambda: True)
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return named(request.param).make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    with asked_for():
        engine = make_engine(folder)
    assert engine.base.rows_computed(33) == 36
    routing = engine.base.routing
    assert routing is None or onednn.product in {product for product, _ in routing.products}
    assert engine.description.bitwise_reproducible
    return engine


def test_gradients_are_those_of_peft(engine: Engine, folder: Path) -> None:
    request = LoraRequest(rank=4, seed=3, train_mlp=engine.base.routing is None)
    for number, lengths in enumerate([(9,), (7, 33, 18), (150,)]):
        run = EngineRun(engine, f"peft{number}", request, random=4)
        oracle = PeftTrainer(folder, run.spec, run.export().weights)
        check_gradient(run, oracle, for_loss(make_documents(77, lengths), Ppo()), Ppo())


def test_tenants_together_are_each_alone_to_the_bit(engine: Engine) -> None:
    test_layer_kinds_trainer.test_tenants_together_are_each_alone_to_the_bit(engine)


def test_a_recomputed_pass_gives_the_same_bits(engine: Engine) -> None:
    test_layer_kinds_trainer.test_a_recomputed_pass_gives_the_same_bits(engine)


def test_losses_beside_each_other_are_each_alone_to_the_bit(qwen3_folder: Path) -> None:
    with asked_for():
        engine = make_engine(qwen3_folder)
    test_fused_equals_alone.test_eight_runs_fused_equal_each_alone(engine)


@given(
    rows=st.integers(0, 300),
    outer=st.integers(1, 90),
    inner=st.integers(1, 90),
    turned=st.booleans(),
    bias=st.booleans(),
)
def test_a_product_is_that_of_torch(
    rows: int, outer: int, inner: int, turned: bool, bias: bool
) -> None:
    x = torch.randn(rows, inner)
    weight = torch.randn(inner, outer).t() if turned else torch.randn(outer, inner)
    added = torch.randn(outer) if bias else None
    expected = functional.linear(
        x.double(), weight.double(), None if added is None else added.double()
    )
    assert torch.allclose(onednn.product(x, weight, added).double(), expected, atol=1e-4)


@given(rows=st.integers(1, 5000), shape=st.sampled_from([(64, 48), (48, 64), (300, 16)]))
def test_a_row_is_the_same_among_any_number(rows: int, shape: tuple[int, int]) -> None:
    x = torch.randn(max(rows, MIN_ROWS), shape[1])
    weight = torch.randn(shape)
    few = onednn.product(x[-MIN_ROWS:], weight)
    assert torch.equal(onednn.product(x, weight)[-MIN_ROWS:], few)


def test_numbers_of_rows_are_few_and_near() -> None:
    computed = [onednn.rows_computed(rows) for rows in range(1, 8193)]
    assert all(rows <= own for rows, own in enumerate(computed, 1))
    assert max(own / rows for rows, own in enumerate(computed, 1) if rows >= 32) <= 1.125
    assert max(own - rows for rows, own in enumerate(computed, 1)) < 128
    assert len({own for own in computed if own <= 1024}) <= 48
    assert computed == sorted(computed)
    assert all(onednn.rows_computed(own) == own for own in computed)


def test_small_matrices_other_types_and_devices_stay_with_torch() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "_has_what_mkl_leaves", lambda: True)
        assert onednn.faster(torch.zeros(256, 256)) is onednn.product
        assert onednn.faster(torch.zeros(255, 256)) is functional.linear
        assert onednn.faster(torch.zeros(256, 256, dtype=torch.bfloat16)) is functional.linear
        assert onednn.faster(torch.zeros(256, 256, device="meta")) is functional.linear
        patch.setattr(onednn, "_has_what_mkl_leaves", lambda: False)
        assert onednn.faster(torch.zeros(256, 256)) is functional.linear
