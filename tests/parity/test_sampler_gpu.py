"""The sampler on a GPU, decoding in recorded passes, against itself on the CPU and against the
trainer. Needs a GPU.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from mint_core.lora.bank import Part
from mint_core.lora.spec import LoraRequest
from sampler_service.jobs import BASE_MODEL, DropAdapter, Generated
from tests.engines_in_process import make_engine, score
from tests.models import VOCABULARY_SIZE
from tests.parity.sampler_checks import assert_bitwise, random_tokens
from tests.sampler_in_process import SamplerEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
RANK_3, RANK_8, RANK_16 = (f"mint://run/sampler_weights/rank-{rank}@1" for rank in (3, 8, 16))
REQUESTS = {
    RANK_3: LoraRequest(rank=3),
    RANK_8: LoraRequest(rank=8),
    RANK_16: LoraRequest(rank=16),
}
ADAPTERS = (BASE_MODEL, *REQUESTS)


def make_sampler(folder: Path, device: str, dtype: str, **options: object) -> SamplerEngine:
    sampler = SamplerEngine(folder, device=device, dtype=dtype, **options)
    for seed, (path, request) in enumerate(REQUESTS.items()):
        sampler.load(path, request, random=seed)
    return sampler


def generate(sampler: SamplerEngine, **wishes: object) -> list[Generated]:
    """Requests of all adapters, of which each comes a step later."""
    rng = np.random.default_rng(0)
    numbers = []
    for i in range(10):
        prompt = rng.integers(3, VOCABULARY_SIZE, 1 + 40 * i).tolist()
        adapter = ADAPTERS[i % len(ADAPTERS)]
        numbers.append(sampler.submit(prompt, adapter=adapter, max_tokens=24, seed=i, **wishes))  # type: ignore[arg-type]
        sampler.step()
    return [sampler.answer(number) for number in numbers]


def test_float32_on_the_gpu_gives_the_cpus_tokens(qwen3_folder: Path) -> None:
    on_gpu = make_sampler(qwen3_folder, "cuda", "float32")
    expected = generate(make_sampler(qwen3_folder, "cpu", "float32"))
    for attempt in range(2):  # recorded, then replayed
        for ours, theirs in zip(generate(on_gpu), expected, strict=True):
            (a,), (b,) = ours.continuations, theirs.continuations
            assert a.tokens.tolist() == b.tokens.tolist(), attempt
            np.testing.assert_allclose(a.model_logprobs, b.model_logprobs, atol=1e-4)
    decoder = on_gpu.engine.runner.decoder
    assert decoder is not None
    assert decoder.recordings.recorder is not None
    assert sum(replay is not None for replay in decoder.recordings.passes.values()) >= 4


def test_options_of_sampling_give_the_cpus_tokens(qwen3_folder: Path) -> None:
    wishes = {
        "min_p": 0.02,
        "presence_penalty": 0.7,
        "repetition_penalty": 1.2,
        "topk_sample_logprobs": 3,
    }
    on_gpu = generate(make_sampler(qwen3_folder, "cuda", "float32"), **wishes)
    expected = generate(make_sampler(qwen3_folder, "cpu", "float32"), **wishes)
    for ours, theirs in zip(on_gpu, expected, strict=True):
        (a,), (b,) = ours.continuations, theirs.continuations
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.topk_logprobs is not None
        assert b.topk_logprobs is not None
        np.testing.assert_allclose(a.topk_logprobs.logprobs, b.topk_logprobs.logprobs, atol=1e-4)


def test_replayed_passes_equal_launched_ones_bitwise(qwen3_folder: Path) -> None:
    recorded = make_sampler(qwen3_folder, "cuda", "bfloat16")
    launched = make_sampler(qwen3_folder, "cuda", "bfloat16")
    assert launched.engine.runner.decoder is not None
    launched.engine.runner.decoder.recordings.recorder = None
    for ours, theirs in zip(generate(recorded), generate(launched), strict=True):
        (a,), (b,) = ours.continuations, theirs.continuations
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.model_logprobs.tobytes() == b.model_logprobs.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8"])
def test_batch_invariant_a_seed_gives_the_same_bits_on_a_busy_gpu(
    dtype: str, qwen3_folder: Path
) -> None:
    sampler = make_sampler(qwen3_folder, "cuda", dtype, batch_invariant=True)
    assert sampler.model.bitwise_reproducible
    wishes = [
        {
            "prompt": random_tokens(i, length),
            "adapter": ADAPTERS[i % len(ADAPTERS)],
            "num_samples": 1 + i % 3,
            "max_tokens": 20,
            "seed": i,
            "temperature": (1.0, 0.7)[i % 2],
            "top_p": (1.0, 0.9, 1.0)[i % 3],
            "top_k": (0, 0, 0, 30)[i % 4],
            "topk_sample_logprobs": 3 * (i % 2),
            "prompt_logprobs": i % 3 == 0,
        }
        for i, length in enumerate((1, 2, 700, 16, 17, 129, 1100, 40))
    ]
    alone = [sampler.generate(**wish, tenant="alone") for wish in wishes]  # type: ignore[arg-type]
    numbers = []
    for i, wish in enumerate(wishes):
        numbers.append(sampler.submit(**wish, tenant="beside"))  # type: ignore[arg-type]
        other = random_tokens(50 + i, 20 + 60 * i)
        gone = sampler.submit(other, adapter=ADAPTERS[-i % len(ADAPTERS)], num_samples=4)
        sampler.step()
        if i % 3 == 0:
            sampler.abort(gone)
    for expected, number in zip(alone, numbers, strict=True):
        assert_bitwise(expected, sampler.answer(number))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_bfloat16_logprobs_are_near_the_trainers(adapter: str, qwen3_folder: Path) -> None:
    sampler = make_sampler(qwen3_folder, "cuda", "bfloat16")
    prompt = np.random.default_rng(1).integers(3, VOCABULARY_SIZE, 60).tolist()
    generated = sampler.generate(prompt, adapter=adapter, max_tokens=200, prompt_logprobs=True)
    (continuation,) = generated.continuations
    trainer = make_engine(qwen3_folder, device="cuda", dtype="bfloat16")
    tokens = [*prompt, *continuation.tokens]
    if adapter == BASE_MODEL:
        trained = score(trainer, tokens)
    else:
        trained = score(trainer, tokens, sampler.row(adapter).spec, sampler.arrays[adapter])
    assert generated.prompt_logprobs is not None
    ours = np.concatenate([generated.prompt_logprobs, continuation.model_logprobs])
    difference = ours - trained
    assert np.abs(difference).mean() <= 1e-2
    # Of the tokens that it drew: a low-variance estimate of KL(sampler, trainer).
    ratio = -difference[len(prompt) - 1 :]
    assert (np.expm1(ratio) - ratio).mean() <= 1e-3


def test_a_broken_adapter_leaves_recorded_neighbours_alone(qwen3_folder: Path) -> None:
    sampler = make_sampler(qwen3_folder, "cuda", "bfloat16")
    prompt = list(range(3, 40))
    expected = sampler.generate(prompt, adapter=RANK_8, seed=1)
    sampler.row(RANK_16).part(Part.WEIGHTS).fill_(torch.nan)
    sampler.submit(prompt, adapter=RANK_16)
    number = sampler.submit(prompt, adapter=RANK_8, seed=1)
    (ours,), (theirs,) = sampler.answer(number).continuations, expected.continuations
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    np.testing.assert_allclose(ours.model_logprobs, theirs.model_logprobs, atol=2e-2)


def test_an_adapter_comes_back_from_host_memory_as_it_was(qwen3_folder: Path) -> None:
    sampler = make_sampler(qwen3_folder, "cuda", "float32")
    adapters = sampler.engine.adapters
    before = sampler.row(RANK_8).part(Part.WEIGHTS).cpu()
    spec, arrays = sampler.row(RANK_8).spec, sampler.arrays[RANK_8]
    adapters.drop(DropAdapter(RANK_8))
    kept = adapters.host.get(RANK_8)
    assert kept is not None
    assert kept.is_pinned()
    sampler.load_arrays(RANK_8, spec, arrays)
    assert torch.equal(sampler.row(RANK_8).part(Part.WEIGHTS).cpu(), before)
