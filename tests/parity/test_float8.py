"""Float8 weights against what they stand for: numbers, kernels, and a trainer by the book."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mint_core.lora.float8 import MOST_KERNEL_ROWS, Float8Matrix, quantized
from mint_core.lora.spec import AdapterArrays, LoraRequest
from tests.engines_in_process import EngineRun, make_documents, make_engine, manifest_of, save
from tests.float8_folders import by_channel, in_blocks, stands_for, written_out
from tests.interpreted_kernels import DEVICE, in_kernels
from tests.models import own_model, tiny_qwen3
from tests.parity.peft_oracle import PeftTrainer, peft_name
from trainer_service.checkpoints.apart import Merge
from trainer_service.engine.merging import merge
from trainer_service.jobs import AdamParams, CrossEntropy, SaveCheckpoint

from mint_core.lora.weight_kernels import (  # isort: skip  # after interpreted_kernels
    OUTPUTS,
    ROWS,
    multiply,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning")
TOLERANCE = 1e-5
LENGTHS = (7, 33, 2, 18)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def matrix(out: int, inner: int, spans: int) -> Float8Matrix:
    """With scales of any value."""
    numbers = quantized(drawn(out, inner)).numbers
    return Float8Matrix(numbers, drawn(out, spans, seed=1).exp())


def test_weights_are_exact_in_bfloat16_and_near_what_they_were() -> None:
    weight = drawn(40, 70) * torch.logspace(-20, 20, 40, device=DEVICE)[:, None]
    weight[3] = 0.0
    made = quantized(weight)
    stands = made.weight(torch.float32)

    assert torch.equal(stands.bfloat16().float(), stands)
    largest = weight.abs().amax(1, keepdim=True)
    # Half of a step of three bits; below the least of the exponents, of a fixed step.
    assert ((stands - weight).abs() <= 0.066 * weight.abs() + 2**-16 * largest + 1e-38).all()
    mantissas, _ = torch.frexp(made.scales)
    assert mantissas.eq(0.5).all()
    assert made.numbers.float().abs().amax(1)[4:].ge(224).all()
    again = quantized(stands)
    assert torch.equal(again.weight(torch.float32), stands)


def test_what_is_not_finite_stays_so() -> None:
    weight = torch.tensor([[1.0, torch.inf], [torch.nan, 1.0], [1.0, 2.0]])
    finite = quantized(weight).weight(torch.float32).isfinite().all(1)
    assert finite.tolist() == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "inner", "spans"), [(70, 130, 1), (96, 200, 4), (3, 64, 2)])
@pytest.mark.parametrize("rows", [1, ROWS + 3])
def test_the_kernel_gives_what_products_with_the_weight_do(
    rows: int, out: int, inner: int, spans: int, dtype: torch.dtype
) -> None:
    own = matrix(out, inner, spans)
    weight = own.weight(dtype)
    for left, right, back in (
        (drawn(rows, inner, seed=2).to(dtype), weight.t(), False),
        (drawn(rows, out, seed=3).to(dtype), weight, True),
    ):
        expected = (left.float() @ right.float()).to(dtype)
        ours = multiply(left, own.numbers, own.scales, own.span, back=back)
        near = 1e-5 if dtype == torch.float32 else 2**-6  # the interpreter cuts bits off
        assert (ours - expected).abs().max() <= near * expected.abs().max()


def test_a_rows_bits_do_not_depend_on_its_neighbours() -> None:
    """The interpreter's products are numpy's, in which on some CPUs a row's place in a tile tells:
    there parts begin where tiles do.
    """
    own = matrix(OUTPUTS + 7, 130, 1)
    x = drawn(2 * ROWS + 5, 130, seed=2)
    whole = multiply(x, own.numbers, own.scales, own.span)
    parts = [slice(0, 1), slice(ROWS, 2 * ROWS + 3), slice(2 * ROWS, 2 * ROWS + 5)]
    if DEVICE.type == "cuda":
        parts += [slice(3, ROWS + 9), slice(2 * ROWS + 4, 2 * ROWS + 5)]
    for part in parts:
        assert torch.equal(multiply(x[part], own.numbers, own.scales, own.span), whole[part])


def test_many_rows_are_multiplied_with_the_weight_written_out() -> None:
    own, bias = matrix(20, 30, 1), drawn(20, seed=4)
    x = drawn(MOST_KERNEL_ROWS + 1, 30, seed=2)
    few = own.product(x[:5], bias)
    torch.testing.assert_close(own.product(x, bias)[:5], few, rtol=1e-5, atol=1e-4)
    dy = drawn(MOST_KERNEL_ROWS + 1, 20, seed=3)
    parts = [dy[:, :12], dy[:, 12:]]
    few = own.back([part[:5] for part in parts])
    torch.testing.assert_close(own.back(parts)[:5], few, rtol=1e-5, atol=1e-4)


@dataclass(frozen=True)
class Folders:
    """Of a model."""

    model: Path
    plain: Path  # of what its float8 weights stand for


@pytest.fixture(scope="module", params=["made", "in blocks", "by channel"])
def folders(
    request: pytest.FixtureRequest, qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Folders:
    to = tmp_path_factory.mktemp("float8")
    if request.param == "made":
        return Folders(qwen3_folder, stands_for(qwen3_folder, to / "plain"))
    write = in_blocks if request.param == "in blocks" else by_channel
    model = write(qwen3_folder, to / "model")
    return Folders(model, written_out(model, to / "plain"))


def distance(ours: NDArray[np.float32], oracle: torch.Tensor) -> float:
    expected = oracle.detach().numpy()
    return float(np.linalg.norm(ours - expected) / max(np.linalg.norm(expected), 1e-12))


def test_training_equals_peft_on_what_the_weights_stand_for(
    folders: Folders, tmp_path: Path
) -> None:
    """And so does the model that is merged."""
    engine = make_engine(folders.model, dtype="float8", row_folder=tmp_path / "rows")
    run = EngineRun(engine, "run", LoraRequest(rank=12, seed=1, alpha=4.0), random=2)
    oracle = PeftTrainer(folders.plain, run.spec, run.export(False).weights)
    documents = make_documents(1, LENGTHS)
    for _ in range(2):
        result = run.compute(run.tile(documents, CrossEntropy()))
        loss = oracle.loss(CrossEntropy(), documents)
        loss.backward()
        assert result.metrics["loss:sum"] == pytest.approx(loss.item(), rel=TOLERANCE)
        gradient = run.gradient()
        assert max(distance(gradient[n], oracle.gradient(n)) for n in oracle.names) < TOLERANCE
        run.step(AdamParams(learning_rate=3e-3))
        oracle.step(AdamParams(learning_rate=3e-3))
    weights = run.export(False).weights
    for name in oracle.names:
        assert distance(weights[name], oracle.parameters[peft_name(name)]) < TOLERANCE

    merged = merge_into(folders.model, run, tmp_path)
    tokens = torch.from_numpy(documents[1].tokens)
    with torch.no_grad():
        logits = own_model(merged).eval()(input_ids=tokens[None]).logits[0]
        expected = oracle.model(input_ids=tokens[None]).logits[0]
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())


def merge_into(model: Path, run: EngineRun, folder: Path) -> Path:
    adapter, merged = folder / "adapter", folder / "merged"
    for each in (adapter, merged):
        each.mkdir()
    manifest = manifest_of(run.name, run.spec)
    save(run.engine, SaveCheckpoint(manifest=manifest, folder=str(adapter), with_optimizer=False))
    merge(
        Merge(
            base_folder=str(model),
            adapter_folder=str(adapter),
            spec=run.spec,
            output_folder=str(merged),
            dtype="float32",
            threads=1,
            float8=True,
        )
    )
    return merged


def gradients(folder: Path, rows: Path, device: str = "cpu") -> AdapterArrays:
    engine = make_engine(folder, dtype="float8", device=device, row_folder=rows)
    run = EngineRun(engine, "run", LoraRequest(rank=8, seed=1), random=2)
    run.compute(run.tile(make_documents(1, (4, 9)), CrossEntropy()))
    return run.gradient()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU has its own test, below")
@pytest.mark.parametrize("blocks", [False, True])
def test_a_pass_that_reads_the_numbers_gives_what_one_over_the_weights_does(
    blocks: bool, tmp_path: Path
) -> None:
    """With a scale for each channel, and for each block; one layer, since the interpreter takes
    seconds for each.
    """
    plain = tiny_qwen3(tmp_path / "plain", layers=1)
    model = in_blocks(plain, tmp_path / "model") if blocks else plain
    expected = gradients(model, tmp_path / "rows")
    with in_kernels():
        ours = gradients(model, tmp_path / "others")
    for name, matrix in expected.items():
        assert np.abs(ours[name] - matrix).max() <= 2e-5 * max(1e-3, np.abs(matrix).max())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU on this machine")
def test_gradients_on_a_gpu_are_near_the_cpus(folders: Folders, tmp_path: Path) -> None:
    expected = gradients(folders.model, tmp_path / "rows")
    for name, own in gradients(folders.model, tmp_path / "others", device="cuda").items():
        assert np.linalg.norm(own - expected[name]) <= 5e-2 * np.linalg.norm(expected[name])
