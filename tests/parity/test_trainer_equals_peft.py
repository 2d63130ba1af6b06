"""The engine against PEFT + torch.optim.AdamW in float64."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mint_core.lora.spec import LoraRequest
from tests.engines_in_process import (
    EngineRun,
    for_loss,
    make_documents,
    make_engine,
    wide_documents,
)
from tests.models import tiny_gemma2, tiny_llama, tiny_qwen3
from tests.parity.peft_oracle import PeftTrainer
from trainer_service.engine.engine import Engine
from trainer_service.jobs import (
    AdamParams,
    Cispo,
    CrossEntropy,
    Document,
    Dro,
    Gspo,
    ImportanceSampling,
    Loss,
    Ppo,
)

# PEFT warns that an adapter on a tied head leaves the embedding as it is, which is what we want.
pytestmark = pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning")

TOLERANCE = 1e-5  # of the norm of each tensor
LENGTHS = (7, 33, 2, 18)
MODELS: dict[str, Callable[[Path], Path]] = {  # others in test_families.py
    "qwen3-tied": lambda folder: tiny_qwen3(folder, tied=True),
    "llama-untied": lambda folder: tiny_llama(folder, tied=False),
    "gemma2-window-8": tiny_gemma2,
}
TARGETS = {
    "attn": LoraRequest(rank=8, seed=1, train_mlp=False, train_unembed=False),
    "mlp": LoraRequest(rank=3, seed=1, train_attn=False, train_unembed=False, alpha=6.0),
    "unembed": LoraRequest(rank=5, seed=1, train_attn=False, train_mlp=False),
    "all": LoraRequest(rank=12, seed=1, use_rslora=True, alpha=4.0),
}
LOSSES: list[Loss] = [
    CrossEntropy(),
    ImportanceSampling(),
    Ppo(),
    Ppo(0.5, 3.0),
    Cispo(),
    Dro(0.05),
    Gspo(),
    Gspo(0.2, 5.0),
]


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return make_engine(folder)


@pytest.fixture(scope="module")
def oracle(engine: Engine, folder: Path) -> PeftTrainer:
    """Of the runs of `check_gradient`, none of which takes a step."""
    run = EngineRun(engine, "oracle", LoraRequest(rank=4, seed=3), random=4)
    return PeftTrainer(folder, run.spec, run.export().weights)


def distance(ours: np.ndarray, oracle: torch.Tensor) -> float:
    """Norm of the difference over the norm of the oracle's."""
    expected = oracle.detach().numpy()
    return float(np.linalg.norm(ours - expected) / max(np.linalg.norm(expected), 1e-12))


@pytest.mark.parametrize("targets", TARGETS)
def test_logprobs_losses_gradients_and_steps_equal_peft(
    engine: Engine, folder: Path, targets: str, request: pytest.FixtureRequest
) -> None:
    """Requirements 12, 14, 38 to 40, 45 and 47."""
    run = EngineRun(engine, request.node.name, TARGETS[targets], random=2)
    oracle = PeftTrainer(folder, run.spec, run.export().weights)
    params = AdamParams(learning_rate=3e-3, weight_decay=0.02, grad_clip_norm=2.0, beta2=0.95)
    for step, losses in enumerate([LOSSES[:2], LOSSES[2:4], LOSSES[4:]], start=1):
        for number, loss in enumerate(losses):
            documents = for_loss(make_documents(10 * step + number, LENGTHS), loss)
            result = run.compute(run.tile(documents, loss))
            expected = oracle.loss(loss, documents)
            expected.backward()
            assert result.metrics["loss:sum"] == pytest.approx(expected.item(), rel=TOLERANCE)
            for ours, document in zip(result.logprobs, documents, strict=True):
                assert distance(ours, oracle.logprobs(document)) < TOLERANCE
        gradient = run.gradient()
        worst = max(distance(gradient[name], oracle.gradient(name)) for name in oracle.names)
        assert worst < TOLERANCE, "gradient"
        taken = run.step(params)
        assert taken.step == step
        assert taken.grad_norm == pytest.approx(oracle.step(params), rel=TOLERANCE)
    weights = run.export().weights
    assert set(weights) == set(oracle.names)
    for name in oracle.names:
        parameter = oracle.parameters[name.replace(".weight", ".default.weight")]
        assert distance(weights[name], parameter) < TOLERANCE, name


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_each_loss_alone_has_the_gradient_of_peft(
    engine: Engine, oracle: PeftTrainer, loss: Loss, request: pytest.FixtureRequest
) -> None:
    run = EngineRun(engine, request.node.name, LoraRequest(rank=4, seed=3), random=4)
    check_gradient(run, oracle, for_loss(make_documents(77, LENGTHS), loss), loss)


@pytest.mark.parametrize("k", [1, 2, 20])
def test_cross_entropy_over_k_targets_has_the_gradient_of_peft(
    engine: Engine, oracle: PeftTrainer, k: int, request: pytest.FixtureRequest
) -> None:
    run = EngineRun(engine, request.node.name, LoraRequest(rank=4, seed=3), random=4)
    check_gradient(run, oracle, wide_documents(k, LENGTHS, k), CrossEntropy())


def check_gradient(
    run: EngineRun, oracle: PeftTrainer, documents: Sequence[Document], loss: Loss
) -> None:
    result = run.compute(run.tile(documents, loss, weighted=True))
    oracle.model.zero_grad()
    expected = oracle.loss(loss, documents)
    expected.backward()
    assert result.metrics["loss:sum"] == pytest.approx(expected.item(), rel=TOLERANCE)
    for ours, document in zip(result.logprobs, documents, strict=True):
        weighted = oracle.logprobs(document).detach()[torch.from_numpy(document.weighted)]
        assert distance(ours, weighted) < TOLERANCE
    gradient = run.gradient()
    assert max(distance(gradient[name], oracle.gradient(name)) for name in oracle.names) < TOLERANCE
