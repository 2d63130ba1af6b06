"""Decoding over static tensors, as it is recorded in CUDA graphs, against the sampler's ordinary
passes. Here it runs without being recorded, in plain torch and in interpreted kernels.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mint_core.errors import FailedPrecondition
from mint_core.lora.spec import LoraRequest
from mint_core.model.recordings import Recordings, reads_lengths
from sampler_service.engine.cache.blocks import blocks_for
from sampler_service.engine.cache.paged_attention import DecodeAttention
from sampler_service.engine.decoder import Decoder, DecodeRows
from sampler_service.engine.sequences import Span, TokenSequence
from sampler_service.jobs import BASE_MODEL, CHUNK_TOKENS, Generated
from tests.models import (
    VOCABULARY_SIZE,
    tiny_gemma2,
    tiny_gemma3,
    tiny_phi3,
    tiny_qwen3,
)
from tests.recorders import NoRoom, PlainRecorder
from tests.sampler_in_process import SamplerEngine

TOLERANCE = 1e-5
REQUESTS = {
    "mint://r-1/sampler_weights/all@1": LoraRequest(rank=8),
    "mint://r-2/sampler_weights/attn@1": LoraRequest(
        rank=3, train_mlp=False, train_unembed=False, alpha=16
    ),
    "mint://r-3/sampler_weights/head@7": LoraRequest(
        rank=16, train_mlp=False, train_attn=False, use_rslora=True
    ),
}
ADAPTERS = (BASE_MODEL, *REQUESTS)
ALL = ADAPTERS[1]


def make_sampler(folder: Path) -> SamplerEngine:
    sampler = SamplerEngine(folder)
    for seed, (path, request) in enumerate(REQUESTS.items()):
        sampler.load(path, request, random=seed)
    return sampler


def decoding(
    sampler: SamplerEngine,
    *,
    columns: int = 128,
    attend: DecodeAttention | None = None,
    kind: type[Decoder] = Decoder,
) -> Decoder:
    """Gives the sampler the decoder that it has on a GPU."""
    runner = sampler.engine.runner
    runner.decoder = decoder = kind(
        sampler.engine.base,
        runner.cache,
        most_rows=32,
        most_blocks=blocks_for(sampler.model.context_length),
        scratch_block=len(runner.cache.layer(0)[0]) - 1,
        columns=columns,
        attend=attend,
    )
    return decoder


def random_tokens(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY_SIZE, n).tolist()


def generate(sampler: SamplerEngine, max_tokens: int = 12) -> list[Generated]:
    """Requests of different lengths for different adapters, of which each comes a step later."""
    numbers = []
    for i, length in enumerate([1, 2, 15, 16, 17, 100, CHUNK_TOKENS + 40, 33]):
        numbers.append(
            sampler.submit(
                random_tokens(i, length),
                adapter=ADAPTERS[i % len(ADAPTERS)],
                num_samples=1 + i % 3,
                max_tokens=max_tokens + i,
                seed=i,
                temperature=(1.0, 0.7, 0.0)[i % 3],
                min_p=(0.0, 0.05)[i % 2],
                presence_penalty=(0.0, 0.0, 0.7)[i % 3],
                topk_sample_logprobs=i % 2,
                prompt_logprobs=i % 2 == 0,
            )
        )
        sampler.step()
    return [sampler.answer(number) for number in numbers]


def assert_near(ours: list[Generated], theirs: list[Generated]) -> None:
    for left, right in zip(ours, theirs, strict=True):
        for a, b in zip(left.continuations, right.continuations, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=TOLERANCE)
            np.testing.assert_allclose(a.model_logprobs, b.model_logprobs, atol=TOLERANCE)
        if left.prompt_logprobs is not None:
            np.testing.assert_allclose(left.prompt_logprobs, right.prompt_logprobs, atol=TOLERANCE)


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_gemma2, tiny_gemma3, tiny_phi3])
def test_filled_up_batches_of_many_adapters_equal_ordinary_passes(
    make: object, tmp_path: Path
) -> None:
    sampler = make_sampler(make(tmp_path))  # type: ignore[operator]
    expected = generate(sampler)
    decoder = decoding(sampler)

    assert_near(generate(sampler), expected)

    assert len({size for size, _ in decoder.recordings.passes}) > 2  # of 1, 2, 4, 8 and 16 rows
    assert {columns for _, columns in decoder.recordings.passes} == {0, 64}


def test_more_adapters_than_columns_are_computed_in_groups(qwen3_folder: Path) -> None:
    sampler = make_sampler(qwen3_folder)
    expected = generate(sampler)
    decoding(sampler, columns=8)
    assert_near(generate(sampler), expected)


def test_short_pieces_of_prompts_are_rows_of_recorded_passes(qwen3_folder: Path) -> None:
    sampler = make_sampler(qwen3_folder)
    wishes = [
        {"prompt": random_tokens(i, length), "adapter": ADAPTERS[i], "max_tokens": 3, "seed": i}
        for i, length in enumerate((30, 17, 200))
    ]
    expected = [sampler.generate(**wish) for wish in wishes]  # type: ignore[arg-type]
    sampler = make_sampler(qwen3_folder)
    decoder, recorder = decoding(sampler), PlainRecorder()
    decoder.recordings = Recordings(recorder)
    ours = [sampler.generate(**wish) for wish in wishes]  # type: ignore[arg-type]
    assert_near(ours, expected)
    # Of 29 and of 16 tokens, without and with an adapter; the long one is none of them.
    assert [size for size, _ in decoder.recordings.passes if size > 1] == [32, 16]
    numbers = [sampler.submit(**wish) for wish in wishes]  # type: ignore[arg-type]
    assert_near([sampler.answer(number) for number in numbers], expected)
    assert recorder.replays


def test_without_memory_for_graphs_passes_are_launched(qwen3_folder: Path) -> None:
    sampler = make_sampler(qwen3_folder)
    expected = generate(sampler, max_tokens=4)
    decoder = decoding(sampler)
    decoder.recordings = Recordings(NoRoom())
    assert_near(generate(sampler, max_tokens=4), expected)
    assert decoder.recordings.recorder is None


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_gemma3])
def test_decoding_in_the_kernels_equals_ordinary_passes(make: object, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("test_sampler_gpu.py does this with compiled ones")
    interpreted = pytest.importorskip("tests.interpreted_kernels")
    from sampler_service.engine.cache.paged_kernels import paged_attention

    class InKernels(Decoder):
        def __init__(self, *args: Any, **options: Any) -> None:
            with interpreted.in_kernels():
                super().__init__(*args, **options)

        def run(self, *args: Any, **options: Any) -> Any:
            with interpreted.in_kernels():
                return super().run(*args, **options)

    sampler = make_sampler(make(tmp_path))  # type: ignore[operator]
    wishes = [
        {"prompt": random_tokens(i, length), "adapter": adapter, "max_tokens": 3}
        for i, (length, adapter) in enumerate(zip((1, 4, 181, 13), ADAPTERS, strict=True))
    ]
    expected = [sampler.generate(**wish) for wish in wishes]  # type: ignore[arg-type]
    decoding(sampler, attend=paged_attention, kind=InKernels)
    numbers = [sampler.submit(**wish) for wish in wishes]  # type: ignore[arg-type]
    assert_near([sampler.answer(number) for number in numbers], expected)


MOST_OF_A_LAYER = 19  # of which adapters take 8, two for each group


@pytest.mark.skipif(torch.cuda.is_available(), reason="they are counted in the interpreter")
@pytest.mark.parametrize("rows", [1, 20])
def test_a_decoded_token_takes_few_launches_however_many_decode(rows: int, tmp_path: Path) -> None:
    pytest.importorskip("tests.interpreted_kernels")
    few, more = (
        sum(launches_of(tiny_qwen3(tmp_path / str(layers), layers=layers), rows).values())
        for layers in (1, 2)
    )
    assert more - few <= MOST_OF_A_LAYER


def launches_of(folder: Path, rows: int) -> dict[str, int]:
    """Of a pass with adapters."""
    from sampler_service.engine.cache.paged_kernels import paged_attention
    from tests.launches import counted

    sampler = make_sampler(folder)
    with torch.no_grad(), counted() as launches:  # in inference mode views have other names
        decoder = decoding(sampler, attend=paged_attention)
        columns = decoder._columns.admit([sampler.row(path) for path in REQUESTS])
        assert columns
        decoder._rows.fill([], [], rows)
        launches.counts.clear()
        decoder._compute(rows, columns)
    del launches.counts["constant_pad_nd"]  # by which packed weights of a CPU have their sizes
    return dict(launches.counts)


def test_rows_that_fill_up_touch_the_scratch_block_alone(qwen3_folder: Path) -> None:
    sampler = make_sampler(qwen3_folder)
    decoding(sampler)
    key, value = sampler.engine.runner.cache.layer(0)
    # Three samples of which each continues the prompt's second block, in the end in its own.
    sampler.submit(random_tokens(1, 20), num_samples=3, max_tokens=9)
    before = key.clone(), value.clone()
    sampler.drain()
    for part, old in zip((key, value), before, strict=True):
        written = (part != old).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert written == [0, 1, 2, 3, len(part) - 1]


def test_the_block_table_follows_what_sequences_have(qwen3_folder: Path) -> None:
    base = make_sampler(qwen3_folder).engine.base
    rows = DecodeRows(4, 8, 99, 0, base)
    first, second = (TokenSequence(i, 0, "", list(range(40))) for i in (0, 1))
    first.blocks, second.blocks = [3, 4, 5], [3, 7, 9]
    order = [first, second]

    def check(*lengths: int) -> None:
        spans = [Span(s, n - 1, n, True) for s, n in zip(order, lengths, strict=True)]
        rows.fill(spans, [0] * len(spans), 4)
        for row, (sequence, n) in enumerate(zip(order, lengths, strict=True)):
            assert rows.table[row, : blocks_for(n)].tolist() == sequence.blocks[: blocks_for(n)]
        pairs = zip(order, lengths, strict=True)
        slots = [s.blocks[(n - 1) // 16] * 16 + (n - 1) % 16 for s, n in pairs]
        assert rows.numbers["slots"][: len(order)].tolist() == slots
        assert rows.table[len(order) :, 0].tolist() == [99] * (4 - len(order))

    check(20, 33)
    first.blocks[1] = 8  # a copy of its own, before it is written
    check(21, 34)
    order.reverse()
    check(35, 22)
    first.blocks.append(11)  # more than is read
    check(36, 33)
    first.blocks = [12, 13, 14, 15]  # it was sent away
    check(37, 34)
    order.pop()
    check(38)


@pytest.mark.parametrize(("weights", "alpha"), [(1e30, 16.0), (np.nan, 16.0), (1.0, 3e38)])
def test_an_adapter_that_is_broken_fails_its_own_requests_alone(
    qwen3_folder: Path, weights: float, alpha: float
) -> None:
    sampler = make_sampler(qwen3_folder)
    bad = "mint://r-9/sampler_weights/bad@1"
    spec = replace(sampler.row(ALL).spec, alpha=alpha)
    factor = np.float32(1e30 if np.isnan(weights) else weights)
    huge = {name: array * factor for name, array in sampler.arrays[ALL].items()}
    sampler.load_arrays(bad, spec, huge)
    if np.isnan(weights):  # what is loaded is checked; this got there by another way
        sampler.row(bad).part("weights").fill_(torch.nan)  # type: ignore[arg-type]
    prompt = random_tokens(4, 30)
    expected = sampler.generate(prompt, adapter=ALL, seed=1)
    decoding(sampler)
    culprit = sampler.submit(prompt, adapter=bad, num_samples=2)
    neighbour = sampler.submit(prompt, adapter=ALL, seed=1)
    with pytest.raises(FailedPrecondition, match="are not finite"):
        sampler.answer(culprit)
    assert_near([sampler.answer(neighbour)], [expected])


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_gemma2, tiny_phi3])
def test_no_pass_reads_tensors_on_the_host(make: object, tmp_path: Path) -> None:
    """What is recorded is replayed with other values: nothing may follow from those it saw."""
    sampler = make_sampler(make(tmp_path))  # type: ignore[operator]
    decoder = decoding(sampler)
    generate(sampler, max_tokens=2)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        for size, columns in decoder.recordings.passes:  # type: ignore[misc]
            decoder._compute(size, columns)
        with pytest.raises(DataDependentOutputException):
            decoder._logits.sum().item()


@pytest.mark.parametrize(
    ("rope", "reads"),
    [
        (None, False),
        ({"rope_type": "default", "rope_theta": 1e6}, False),
        ({"rope_type": "dynamic", "factor": 2.0}, True),
        ({"full_attention": {"rope_type": "longrope"}, "sliding_attention": {}}, True),
    ],
)
def test_models_that_read_lengths_on_the_host_are_not_recorded(
    rope: dict[str, object] | None, reads: bool
) -> None:
    assert reads_lengths(SimpleNamespace(rope_parameters=rope)) == reads
