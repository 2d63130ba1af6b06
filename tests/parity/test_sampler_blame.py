"""What one request raises or makes of its numbers is its own: the engine and the others go on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mint_core.errors import EngineFault, FailedPrecondition
from mint_core.lora.spec import LoraRequest
from sampler_service.engine.faults import error_of_call
from sampler_service.jobs import BASE_MODEL, Constraint, Generated, Stops
from tests.models import VOCABULARY_SIZE
from tests.sampler_in_process import SamplerEngine

HEAD = "mint://r-1/sampler_weights/head@1"
BAD = "mint://r-9/sampler_weights/bad@1"
BEYOND = 10**6  # a token id that no model has
PROMPT = list(range(40, 80))
CONSTRAINT = Constraint("regex", "sampling_params.regex", "[a-z]+")


@pytest.fixture(scope="module")
def sampler(qwen3_folder: Path) -> SamplerEngine:
    sampler = SamplerEngine(qwen3_folder)
    request = LoraRequest(rank=16, train_mlp=False, train_attn=False)
    sampler.load(HEAD, request, random=1)
    return sampler


def bits(generated: Generated) -> list[tuple[list[int], bytes, bytes]]:
    return [
        (c.tokens.tolist(), c.logprobs.tobytes(), c.model_logprobs.tobytes())
        for c in generated.continuations
    ]


# What the edge refuses; here it stands for whatever a request's arithmetic may raise one day.
CULPRITS = {
    "pass": {"prompt": [*PROMPT[:30], BEYOND]},
    "scores": {"target_prompt_tokens": np.full((len(PROMPT) - 1, 1), BEYOND)},
    "draws": {"temperature": "a"},
    "constraint": {"constraint": CONSTRAINT, "stops": Stops(token_ids=frozenset({BEYOND}))},
    "penalties": {"repetition_penalty": "a"},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wish", CULPRITS.values(), ids=CULPRITS.keys())
def test_what_a_request_raises_is_its_own_error(
    sampler: SamplerEngine, wish: dict[str, object], stream: bool
) -> None:
    wishes = {"num_samples": 3, "seed": 5, "max_tokens": 20}
    expected = [sampler.generate(PROMPT, adapter=a, **wishes) for a in (HEAD, BASE_MODEL)]
    early = sampler.submit(PROMPT, adapter=HEAD, **wishes)
    for _ in range(6):  # it is in the midst of its tokens
        sampler.step()
    # Another's: nothing of the prompt is found, and it is the first to compute it.
    culprit = sampler.submit(
        **{"prompt": PROMPT, "num_samples": 2, "tenant": "b", "stream": stream, **wish}  # type: ignore[arg-type]
    )
    waiting = sampler.submit(PROMPT, tenant="b", **wishes)
    with pytest.raises(EngineFault, match="failed at this call with"):
        sampler.answer(culprit)
    assert [bits(sampler.answer(number)) for number in (early, waiting)] == list(
        map(bits, expected)
    )
    assert not sampler.engine.busy


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate"),
        RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
    ],
)
def test_faults_of_memory_and_device_are_nobodys_request(error: Exception) -> None:
    with pytest.raises(type(error)):
        error_of_call(error)


@pytest.mark.parametrize("changes", [{"alpha": 1e308}, {"alpha": 1e40, "use_rslora": True}])
def test_a_scale_that_is_no_number_is_refused_with_its_adapter(
    sampler: SamplerEngine, changes: dict[str, object]
) -> None:
    spec = replace(sampler.row(HEAD).spec, **changes)
    with pytest.raises(FailedPrecondition, match="smaller `alpha`") as caught:
        sampler.load_arrays(BAD, spec, sampler.arrays[HEAD])
    assert caught.value.metadata["model_path"] == BAD


@pytest.fixture(scope="module")
def apart(sampler: SamplerEngine) -> SamplerEngine:
    """Has an adapter with finite logits after PROMPT: token 0's is too far above all others' for
    float32 to hold how far.
    """
    spec, arrays = sampler.row(HEAD).spec, sampler.arrays[HEAD]
    first_alone = np.zeros((VOCABULARY_SIZE, spec.rank), np.float32)
    first_alone[:, 0] = -1
    first_alone[0, 0] = 1

    def load(path: str, a_factor: float, b_factor: float) -> str:
        factors = {"A": (a_factor, None), "B": (b_factor, first_alone)}
        changed = {}
        for name, array in arrays.items():
            factor, instead = factors[name.removesuffix(".weight")[-1]]
            changed[name] = np.float32(factor) * (array if instead is None else instead)
        sampler.load_arrays(path, spec, changed)
        return path

    def distance(path: str) -> float:
        both = np.full((len(PROMPT), 2), -1)
        both[-1] = 0, 1
        scored = sampler.generate(
            [*PROMPT, 0], adapter=path, num_samples=0, target_prompt_tokens=both
        )
        assert scored.target_prompt_logprobs is not None
        first, other = scored.target_prompt_logprobs[-1]
        return float(first) - float(other)

    found = distance(load("mint://r-2/sampler_weights/far@1", 1, 1e6))
    load(BAD, np.sign(found) * 1e16, 5e38 / abs(found) * 1e6 / 1e16)
    return sampler


def test_distant_logits_can_be_sampled_from(apart: SamplerEngine) -> None:
    generated = apart.generate(PROMPT, adapter=BAD, max_tokens=1)
    assert np.isfinite(generated.continuations[0].logprobs).all()


@pytest.mark.parametrize(
    "wish",
    [
        {"prompt": [*PROMPT, 1], "prompt_logprobs": True},
        {"prompt": [*PROMPT, 0], "target_prompt_tokens": np.ones((len(PROMPT), 1), np.int64)},
        {"prompt": [*PROMPT, 0], "topk_prompt_logprobs": 2},
        {"prompt": PROMPT, "topk_sample_logprobs": 2},
        {"prompt": PROMPT, "constraint": CONSTRAINT},
        {"prompt": PROMPT, "constraint": CONSTRAINT, "stream": True},
    ],
    ids=lambda wish: "-".join(wish),
)
def test_logprobs_that_are_not_finite_are_never_answered(
    apart: SamplerEngine, wish: dict[str, object]
) -> None:
    common = {"adapter": BAD, "stops": Stops(token_ids=frozenset({2})), "max_tokens": 1}
    scores = {"num_samples": 0, "scored_tokens": 1} if wish["prompt"] is not PROMPT else {}
    with pytest.raises(FailedPrecondition, match="are not finite"):
        apart.generate(**{**common, **scores, **wish})  # type: ignore[arg-type]
