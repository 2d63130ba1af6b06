"""Choices of experts that are told and brought: the sampler's against what transformers chooses,
the trainer's gradient against PEFT's with routers that are written out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mint_core.lora.spec import LoraRequest
from sampler_service.jobs import CHUNK_TOKENS, Generated, Routed
from tests.engines_in_process import EngineRun, make_documents, make_engine, run_plan
from tests.families import named
from tests.families.hybrids import HYBRID_MIXTURES
from tests.families.mixtures import EXPERTS, MIXTURES, PER_TOKEN
from tests.family import Family, params
from tests.models import own_model
from tests.parity.peft_oracle import PeftTrainer
from tests.parity.sampler_checks import random_tokens
from tests.parity.test_fused_equals_alone import equal
from tests.parity.test_trainer_equals_peft import distance
from tests.sampler_in_process import SamplerEngine
from trainer_service.engine.engine import Engine
from trainer_service.jobs import AdamParams, CrossEntropy, Document

TOLERANCE = 1e-5
REQUEST = LoraRequest(rank=8, seed=1)
MODELS = [each for each in (*MIXTURES, *HYBRID_MIXTURES) if not each.reads_more_than_text]
ADAPTER = "mint://r-1/sampler_weights/a@1"


def told(seed: int, tokens: int, layers: int) -> Routed:
    """Random choices, all different for a token."""
    scores = np.random.default_rng(seed).random((tokens, layers, EXPERTS))
    return np.argsort(scores, axis=2)[:, :, :PER_TOKEN].astype(np.uint16)


def softmax_router(router: nn.Module, x: Tensor, chosen: Tensor) -> Tensor:
    probabilities = torch.softmax(x @ router.weight.to(x.dtype).T, -1).gather(1, chosen)
    return probabilities / probabilities.sum(1, keepdim=True)


def sigmoid_router(router: nn.Module, x: Tensor, chosen: Tensor) -> Tensor:
    scores = torch.sigmoid(x @ router.weight.to(x.dtype).T).gather(1, chosen)
    return scores / (scores.sum(1, keepdim=True) + 1e-20) * 1.7


def logits_router(router: nn.Module, x: Tensor, chosen: Tensor) -> Tensor:
    return torch.softmax((x @ router.weight.to(x.dtype).T).gather(1, chosen), -1)


ROUTERS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "Qwen 3 MoE": softmax_router,
    "DeepSeek-V3": sigmoid_router,
    "Granite MoE": logits_router,
    "Qwen 3.5 MoE of text": softmax_router,
}


@contextmanager
def routing(model: nn.Module, weights_of: Callable[..., Tensor], chosen: Routed) -> Iterator[None]:
    """Has the routers of transformers' own model choose so, one document at a time."""
    blocks = [
        module
        for module in model.modules()
        if hasattr(module, "experts") and (hasattr(module, "gate") or hasattr(module, "router"))
    ]
    own = []
    for layer, block in enumerate(blocks):
        router = getattr(block, "gate", None) or block.router
        index = torch.from_numpy(chosen[:, layer].astype(np.int64))
        own.append((router, router.forward))

        def forward(
            x: Tensor,
            router: nn.Module = router,
            before: Callable[..., tuple[Tensor, ...]] = router.forward,
            index: Tensor = index,
        ) -> object:
            """In the order in which this release of transformers has index and weights."""
            parts = before(x)
            weights = weights_of(router, x.reshape(-1, x.shape[-1]), index)
            told = (weights if part.is_floating_point() else index for part in parts)
            return tuple(told)

        router.forward = forward
    assert len(blocks) == chosen.shape[1]
    yield
    for router, before in own:
        router.forward = before


@pytest.mark.parametrize("family", ROUTERS)
def test_the_gradient_through_told_experts_is_that_of_peft(family: str, tmp_path: Path) -> None:
    folder = named(family).make(tmp_path)
    engine = make_engine(folder)
    assert engine.description.routed is not None
    layers = engine.description.routed.layers
    run = EngineRun(engine, "told", REQUEST, random=2)
    oracle = PeftTrainer(folder, run.spec, run.export().weights)
    documents = []
    for i, document in enumerate(make_documents(3, (7, 33, 18))):
        chosen = told(i, len(document.tokens), layers)
        documents.append(replace(document, routed=chosen.astype(np.int32)))
        with routing(oracle.model, ROUTERS[family], chosen):
            oracle.loss(CrossEntropy(), documents[-1:]).backward()

    result = run.compute(run.tile(documents, CrossEntropy()))

    for i, (ours, document) in enumerate(zip(result.logprobs, documents, strict=True)):
        with routing(oracle.model, ROUTERS[family], told(i, len(document.tokens), layers)):
            assert distance(ours, oracle.logprobs(document)) < TOLERANCE
    gradient = run.gradient()
    for name in oracle.names:
        assert distance(gradient[name], oracle.gradient(name)) < TOLERANCE, name


@pytest.fixture(scope="module", params=params(MODELS, ROUTERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family: Family = request.param
    return family.make(tmp_path_factory.mktemp(family.id))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return make_engine(folder)


@pytest.fixture(scope="module")
def sampler(folder: Path) -> SamplerEngine:
    sampler = SamplerEngine(folder)
    sampler.load(ADAPTER, REQUEST, random=1)
    return sampler


def whole(generated: Generated, sample: int) -> Routed:
    own = generated.continuations[sample].routed
    assert own is not None
    assert generated.prompt_routed is not None
    return np.concatenate([generated.prompt_routed, own])


@pytest.mark.parametrize("prompt_tokens", [1, 40, CHUNK_TOKENS + 20])
def test_the_sampler_tells_what_transformers_chooses(
    prompt_tokens: int, sampler: SamplerEngine, folder: Path
) -> None:
    """Also of a prompt whose beginning lies in the cache."""
    prompt = random_tokens(4, prompt_tokens)
    sampler.generate(prompt, max_tokens=3)
    generated = sampler.generate(prompt, num_samples=2, max_tokens=9, routed_experts=True)
    assert generated.prompt_cache_hit_tokens == 0
    model = own_model(folder, torch.float64)
    for sample, continuation in enumerate(generated.continuations):
        chosen: list[Tensor] = []
        hooks = [
            module.register_forward_pre_hook(lambda _, args, into=chosen: into.append(args[1]))
            for name, module in model.named_modules()
            if name.endswith(".experts") and hasattr(module, "gate_up_proj")
        ]
        with torch.no_grad():
            model(torch.tensor([[*prompt, *continuation.tokens[:-1].tolist()]]))
        for hook in hooks:
            hook.remove()
        expected = torch.stack(chosen, 1).sort(dim=2).values.numpy()
        assert np.array_equal(np.sort(whole(generated, sample), axis=2), expected)


def document_of(prompt: list[int], generated: Generated, sample: int) -> Document:
    tokens = np.array([*prompt, *generated.continuations[sample].tokens.tolist()])
    return Document(
        tokens=tokens[:-1],
        targets=tokens[1:],
        weights=np.ones(len(tokens) - 1, np.float32),
        routed=whole(generated, sample).astype(np.int32),
    )


def test_what_the_sampler_told_gives_the_trainer_the_same_bits(
    engine: Engine, sampler: SamplerEngine
) -> None:
    prompt = random_tokens(5, 30)
    generated = sampler.generate(prompt, num_samples=2, max_tokens=9, routed_experts=True)
    results = []
    for brought in (True, False):
        run = EngineRun(engine, f"brought{brought}", REQUEST)  # B is zero: the base, as it sampled
        data = [document_of(prompt, generated, i) for i in range(2)]
        data = [d if brought else replace(d, routed=None) for d in data]
        result = run.compute(run.tile(data, CrossEntropy()))
        run.step(AdamParams())
        results.append((result.metrics, run.export()))
    assert results[0][0] == results[1][0]
    assert equal(results[0][1], results[1][1])


def test_those_sent_away_tell_the_same(folder: Path, sampler: SamplerEngine) -> None:
    tight = SamplerEngine(folder, kv_cache_tokens=320)
    prompts = [random_tokens(i, 40) for i in range(5)]
    both = []
    for engine in (sampler, tight):
        wishes = {"max_tokens": 40, "routed_experts": True}
        numbers = [engine.submit(prompt, **wishes) for prompt in prompts]  # type: ignore[arg-type]
        both.append([whole(engine.answer(number), 0) for number in numbers])
    assert all(map(np.array_equal, *both))


def test_told_experts_of_one_run_touch_no_other(engine: Engine) -> None:
    """In the same pass as one that tells a part, and one that tells nothing."""
    assert engine.description.routed is not None
    layers = engine.description.routed.layers
    (first, second), (third,) = make_documents(1, (9, 20)), make_documents(2, (13,))
    part = told(1, 9, layers).astype(np.int32)
    part[4:] = -1
    data = [
        (replace(first, routed=part), second),
        (replace(third, routed=told(2, 13, layers).astype(np.int32)),),
        (third,),
    ]
    together = [EngineRun(engine, f"told{i}", REQUEST, random=i) for i in range(3)]
    fused = run_plan(
        engine,
        *[run.tile(d, CrossEntropy()) for run, d in zip(together, data, strict=True)],
    )
    for i, (run, documents) in enumerate(zip(together, data, strict=True)):
        alone = EngineRun(engine, f"alone{i}", REQUEST, random=i)
        assert fused[i].metrics == alone.compute(alone.tile(documents, CrossEntropy())).metrics
        assert run.step(AdamParams()) == alone.step(AdamParams())
        assert equal(run.export(), alone.export())
