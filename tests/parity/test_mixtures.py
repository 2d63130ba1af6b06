"""Mixtures of experts whose experts stay frozen: the trainer against PEFT in float64, and each run
against itself alone; the sampler against transformers' own generation, the trainer, and itself.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from checkpoint_store.adapter_files import write_files
from mint_core.lora.spec import LoraRequest
from sampler_service.jobs import BASE_MODEL, CHUNK_TOKENS
from tests.engines_in_process import (
    EngineRun,
    for_loss,
    make_documents,
    make_engine,
    run_plan,
    score,
)
from tests.mixtures import CONFIGS, tiny_mixture
from tests.parity.peft_oracle import PeftTrainer
from tests.parity.sampler_checks import (
    assert_busy_is_idle,
    assert_greedy_is_generate,
    random_tokens,
)
from tests.parity.test_fused_equals_alone import equal
from tests.parity.test_memory import peak_bytes, recompute
from tests.parity.test_trainer_equals_peft import distance
from tests.sampler_in_process import SamplerEngine
from trainer_service.engine.engine import Engine
from trainer_service.engine.memory import measure
from trainer_service.jobs import AdamParams, CrossEntropy, Dro, ImportanceSampling, Loss, Ppo

TOLERANCE = 1e-5  # of the norm of each tensor
# Of gradients, at the first step and at the second. PEFT's own in float32 are as far away at the
# same weights; at the second, weights have drifted apart by their rounding.
GRADIENT_TOLERANCE = {"gemma-4": (2e-5, 2e-4)}
LENGTHS = (7, 33, 2, 18)
STEPS = 20
REQUESTS = [
    LoraRequest(rank=8, seed=1),
    LoraRequest(rank=13, seed=2, train_unembed=False, use_rslora=True),
    LoraRequest(rank=3, seed=3, train_mlp=False, alpha=8.0),
]
LOSSES: list[Loss] = [CrossEntropy(), Ppo(), Dro(0.1)]
ADAPTER = "mint://r-1/sampler_weights/a@1"
NARROW = "mint://r-2/sampler_weights/b@1"


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mixture(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return make_engine(folder)


@pytest.fixture(scope="module")
def sampler(folder: Path) -> SamplerEngine:
    sampler = SamplerEngine(folder)
    sampler.load(ADAPTER, LoraRequest(rank=8), random=0)
    sampler.load(NARROW, LoraRequest(rank=3, train_mlp=False), random=1)
    return sampler


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_logprobs_gradients_and_steps_equal_peft(
    engine: Engine, folder: Path, number: int, request: pytest.FixtureRequest
) -> None:
    family = request.node.callspec.params["folder"]
    tolerances = GRADIENT_TOLERANCE.get(family, (TOLERANCE, TOLERANCE))
    run = EngineRun(engine, request.node.name, REQUESTS[number], random=2)
    oracle = PeftTrainer(folder, run.spec, run.export().weights)
    # A small eps would have the sign of a gradient near 0 count as much as a large gradient.
    params = AdamParams(learning_rate=3e-3, weight_decay=0.02, grad_clip_norm=2.0, eps=1e-3)
    for step, loss in enumerate([CrossEntropy(), ImportanceSampling()]):
        documents = for_loss(make_documents(10 * step, LENGTHS), loss)
        result = run.compute(run.tile(documents, loss))
        expected = oracle.loss(loss, documents)
        expected.backward()
        assert result.metrics["loss:sum"] == pytest.approx(expected.item(), rel=TOLERANCE)
        for ours, document in zip(result.logprobs, documents, strict=True):
            assert distance(ours, oracle.logprobs(document)) < TOLERANCE
        gradient = run.gradient()
        for name in oracle.names:
            assert distance(gradient[name], oracle.gradient(name)) < tolerances[step], name
        grad_norm = run.step(params).grad_norm
        assert grad_norm == pytest.approx(oracle.step(params), rel=TOLERANCE)
    for name, weights in run.export().weights.items():
        parameter = oracle.parameters[name.replace(".weight", ".default.weight")]
        assert distance(weights, parameter) < TOLERANCE, name


def test_runs_together_equal_each_alone(engine: Engine) -> None:
    together = [EngineRun(engine, f"beside{i}", r, random=i) for i, r in enumerate(REQUESTS)]
    alone = [EngineRun(engine, f"alone{i}", r, random=i) for i, r in enumerate(REQUESTS)]
    lengths = [(1,), (3, 40), (17, 2, 9), (64,), (5, 5)]
    for step in range(STEPS):
        data = [
            for_loss(make_documents(100 * i + step, lengths[(i + step) % len(lengths)]), loss)
            for i, loss in enumerate(LOSSES)
        ]
        order = np.random.default_rng(step).permutation(len(REQUESTS))
        fused = run_plan(engine, *[together[i].tile(data[i], LOSSES[i]) for i in order])
        for i, result in zip(order, fused, strict=True):
            expected = alone[i].compute(alone[i].tile(data[i], LOSSES[i]))
            assert result.metrics == expected.metrics
            params = AdamParams(learning_rate=1e-2)
            assert together[i].step(params) == alone[i].step(params)
    for beside, by_itself in zip(together, alone, strict=True):
        assert equal(beside.export(), by_itself.export())


def test_recomputed_layers_have_the_same_bits_and_a_pass_takes_what_was_computed(
    engine: Engine,
) -> None:
    memory = measure(engine.base, 8)
    exports = []
    for recomputed in (False, True):
        run = EngineRun(engine, f"recomputed{recomputed}", REQUESTS[0], random=1)
        run.compute(run.tile(make_documents(1, (8,)), CrossEntropy()))
        recompute(engine, on=recomputed)
        tokens = 300
        taken = memory.recomputed_pass_bytes(tokens) if recomputed else memory.pass_bytes(tokens)
        assert peak_bytes(run, *make_documents(1, (tokens,))) <= 1.05 * taken
        run.step(AdamParams())
        exports.append(run.export())
    recompute(engine, on=False)
    assert equal(*exports)


@pytest.mark.parametrize("prompt_tokens", [1, 17, CHUNK_TOKENS + 40])
def test_greedy_equals_generate(folder: Path, prompt_tokens: int, sampler: SamplerEngine) -> None:
    assert_greedy_is_generate(sampler, folder, prompt_tokens, TOLERANCE)


@pytest.mark.parametrize("adapter", [ADAPTER, NARROW])
def test_logprobs_of_samples_equal_the_trainers(
    engine: Engine, sampler: SamplerEngine, adapter: str
) -> None:
    prompt = random_tokens(1, 60)
    generated = sampler.generate(prompt, adapter=adapter, max_tokens=40, prompt_logprobs=True)
    (continuation,) = generated.continuations
    tokens = [*prompt, *continuation.tokens.tolist()]
    trained = score(engine, tokens, sampler.row(adapter).spec, sampler.arrays[adapter])
    assert generated.prompt_logprobs is not None
    got = np.concatenate([generated.prompt_logprobs, continuation.model_logprobs])
    assert np.abs(got - trained).max() <= TOLERANCE


def test_a_busy_sampler_gives_the_bits_of_an_idle_one(sampler: SamplerEngine) -> None:
    adapters = (BASE_MODEL, ADAPTER, NARROW)
    wishes = [
        {"prompt": random_tokens(i, n), "adapter": adapters[i % 3], "num_samples": 1 + i % 2}
        for i, n in enumerate([1, 2, 30, 64, CHUNK_TOKENS + 9, 33])
    ]
    assert_busy_is_idle(sampler, wishes, adapters)


def test_those_sent_away_come_back_with_the_same_tokens(
    folder: Path, sampler: SamplerEngine
) -> None:
    tight = SamplerEngine(folder, kv_cache_tokens=320)
    prompts = [random_tokens(i, 40) for i in range(5)]
    expected = [sampler.generate(prompt, max_tokens=100, seed=4) for prompt in prompts]
    numbers = [tight.submit(prompt, max_tokens=100, seed=4) for prompt in prompts]
    for left, number in zip(expected, numbers, strict=True):
        a, b = left.continuations[0], tight.answer(number).continuations[0]
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.model_logprobs, b.model_logprobs, atol=TOLERANCE)


def test_a_published_adapter_opens_in_peft_with_the_same_logprobs(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    run = EngineRun(engine, "published", REQUESTS[2], random=5)
    write_files(
        tmp_path,
        run.export().weights,
        None,
        spec=run.spec,
        base_model="tiny",
        base_fingerprint="f",
        step=0,
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    model = PeftModel.from_pretrained(base, tmp_path)
    tokens = random_tokens(3, 40)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    ours = score(engine, tokens, run.spec, run.export().weights)
    assert distance(ours, expected) < TOLERANCE
