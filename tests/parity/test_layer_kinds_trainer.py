"""Models whose layers have experts, or mix tokens through states, or both: alone against beside
others, recomputed against kept. tests/parity/test_families.py has them against PEFT.
"""

from pathlib import Path

import numpy as np
import pytest

from mint_core.lora.spec import LoraRequest
from tests.checkpoint_files import same
from tests.engines_in_process import EngineRun, for_loss, make_documents, make_engine, run_plan
from tests.families.hybrids import BY_DEFAULT, HYBRID_MIXTURES, HYBRIDS
from tests.families.mixtures import MIXTURES
from tests.family import Family, params
from tests.parity.test_memory import peak_bytes, recompute
from trainer_service.engine.engine import Engine
from trainer_service.engine.memory import measure
from trainer_service.jobs import AdamParams, CrossEntropy, Gspo, Loss, Ppo, TileResult

STEPS = 8
REQUESTS = [
    LoraRequest(rank=8, seed=1),
    LoraRequest(rank=3, seed=2, train_mlp=False, alpha=6.0),
    LoraRequest(rank=24, seed=3, use_rslora=True, train_unembed=False),
]
LOSSES: list[Loss] = [CrossEntropy(), Ppo(0.9, 1.1), Gspo(0.2, 5.0)]
MODELS = [each for each in (*MIXTURES, *HYBRIDS, *HYBRID_MIXTURES) if not each.reads_more_than_text]


@pytest.fixture(scope="module", params=params(MODELS, BY_DEFAULT))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family: Family = request.param
    return family.make(tmp_path_factory.mktemp(family.id))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return make_engine(folder)


def test_tenants_together_are_each_alone_to_the_bit(engine: Engine) -> None:
    """Steps of different ranks, losses and lengths, in any order."""

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
