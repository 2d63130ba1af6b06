"""Models whose layers mix tokens through states, against PEFT, and alone against beside others."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from checkpoint_store.adapter_files import write_files
from mint_core.lora.spec import LoraRequest
from mint_core.lora.targets import group
from tests.checkpoint_files import same
from tests.engines_in_process import (
    EngineRun,
    for_loss,
    make_documents,
    make_engine,
    run_plan,
    score,
)
from tests.hybrids import tiny_granite_hybrid, tiny_lfm2, tiny_qwen3_5, tiny_qwen3_next
from tests.parity.peft_oracle import PeftTrainer
from tests.parity.test_memory import peak_bytes, recompute
from tests.parity.test_trainer_equals_peft import distance
from trainer_service.engine.engine import Engine
from trainer_service.engine.memory import measure
from trainer_service.jobs import (
    AdamParams,
    CrossEntropy,
    Dro,
    Gspo,
    ImportanceSampling,
    Loss,
    Ppo,
    TileResult,
)

# PEFT warns that an adapter on a tied head leaves the embedding as it is, which is what we want.
pytestmark = pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning")

# Of the norm of each tensor. On these models PEFT in float32 is as far from float64 as we are.
TOLERANCE = 2e-5
MODELS = {
    "qwen3.5": tiny_qwen3_5,
    "qwen3-next": tiny_qwen3_next,
    "lfm2": tiny_lfm2,
    "granite-hybrid": tiny_granite_hybrid,
}
LENGTHS = (7, 70, 2, 18)
STEPS = 20
REQUESTS = [
    LoraRequest(rank=8, seed=1),
    LoraRequest(rank=3, seed=2, train_mlp=False, alpha=6.0),
    LoraRequest(rank=24, seed=3, use_rslora=True, train_unembed=False),
]
LOSSES: list[Loss] = [CrossEntropy(), Ppo(0.9, 1.1), Gspo(0.2, 5.0)]


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make: Callable[[Path], Path] = MODELS[request.param]
    return make(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return make_engine(folder)


def whole(folder: Path, rank: int) -> LoraRequest:
    """All linear layers; but PEFT takes the MLP of any Qwen3-Next for experts."""
    config = json.loads((folder / "config.json").read_text())
    return LoraRequest(rank=rank, seed=1, train_mlp=config["model_type"] != "qwen3_next")


def test_logprobs_losses_gradients_and_steps_equal_peft(engine: Engine, folder: Path) -> None:
    run = EngineRun(engine, "peft", whole(folder, 12), random=2)
    mixing = [
        name for name in run.spec.modules if group(name) == "attn" and "self_attn" not in name
    ]
    assert mixing, "the projections of layers with state are trained"
    oracle = PeftTrainer(folder, run.spec, run.export().weights)
    params = AdamParams(learning_rate=3e-3, weight_decay=0.02, grad_clip_norm=2.0)
    losses: Sequence[Sequence[Loss]] = [(CrossEntropy(), ImportanceSampling()), (Ppo(), Dro(0.05))]
    for step, own in enumerate(losses, start=1):
        for number, loss in enumerate(own):
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
        assert run.step(params).grad_norm == pytest.approx(oracle.step(params), rel=TOLERANCE)
    weights = run.export().weights
    assert set(weights) == set(oracle.names)
    for name in oracle.names:
        parameter = oracle.parameters[name.replace(".weight", ".default.weight")]
        assert distance(weights[name], parameter) < TOLERANCE, name


def test_tenants_together_are_each_alone_to_the_bit(engine: Engine) -> None:
    """20 steps of different ranks and losses, in any order."""

    def data(run: int, step: int) -> list[object]:
        lengths = [(1,), (3, 40), (17, 2, 9), (130,), (65, 5), (2, 1, 1, 7)][(run + step) % 6]
        return list(for_loss(make_documents(100 * run + step, lengths), LOSSES[run]))

    together = [EngineRun(engine, f"fused{i}", r, random=i) for i, r in enumerate(REQUESTS)]
    history: list[list[TileResult]] = [[] for _ in together]
    for step in range(STEPS):
        tiles = [run.tile(data(i, step), LOSSES[i]) for i, run in enumerate(together)]  # type: ignore[arg-type]
        order = np.random.default_rng(step).permutation(len(tiles))
        results = run_plan(engine, *[tiles[i] for i in order])
        for i, result in zip(order, results, strict=True):
            history[i].append(result)
            together[i].step(AdamParams(learning_rate=1e-2))
    for i, request in enumerate(REQUESTS):
        alone = EngineRun(engine, f"alone{i}", request, random=i)
        for step in range(STEPS):
            result = alone.compute(alone.tile(data(i, step), LOSSES[i]))  # type: ignore[arg-type]
            assert result.metrics == history[i][step].metrics
            for a, b in zip(result.logprobs, history[i][step].logprobs, strict=True):
                assert np.array_equal(a, b)
            alone.step(AdamParams(learning_rate=1e-2))
        assert same(alone.export().weights, together[i].export().weights), request


def test_a_recomputed_pass_gives_the_same_bits(engine: Engine) -> None:
    gradients = []
    for on in (False, True):
        run = EngineRun(engine, f"recompute-{on}", REQUESTS[0], random=1)
        recompute(engine, on)
        run.compute(run.tile(make_documents(2, (300, 9)), CrossEntropy()))
        gradients.append(run.gradient())
    recompute(engine, False)
    assert same(*gradients)


def test_a_pass_takes_what_was_computed(engine: Engine) -> None:
    recompute(engine, on=False)
    run = EngineRun(engine, "memory", LoraRequest(rank=128, seed=1), random=1)
    run.compute(run.tile(make_documents(1, (8,)), CrossEntropy()))  # makes the row's gradient
    memory = measure(engine.base, 128)
    for tokens in (60, 700):
        recompute(engine, on=False)
        kept = peak_bytes(run, *make_documents(1, (tokens,)))
        assert 0.95 * kept <= memory.pass_bytes(tokens) <= 1.5 * kept
        recompute(engine, on=True)
        recomputed = peak_bytes(run, *make_documents(1, (tokens,)))
        assert 0.95 * recomputed <= memory.recomputed_pass_bytes(tokens) <= 2 * recomputed


def test_an_adapter_opens_in_peft_with_the_same_logprobs(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    run = EngineRun(engine, "export", whole(folder, 8), random=3)
    weights = run.export().weights
    write_files(
        tmp_path,
        weights,
        None,
        spec=run.spec,
        base_model=str(folder),
        base_fingerprint="f",
        step=1,
    )
    tokens = np.random.default_rng(0).integers(3, 512, 90)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    opened = PeftModel.from_pretrained(base, str(tmp_path))
    with torch.no_grad():
        logprobs = opened(torch.from_numpy(tokens)[None]).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.from_numpy(tokens)[1:, None])[:, 0].numpy()
    ours = score(engine, tokens.tolist(), run.spec, weights)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
