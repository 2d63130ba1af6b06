"""`batch_invariant`: a seed gives the same bits alone and beside others where kernels compute, here
in Triton's interpreter, and elsewhere is what it always was.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mint_core.errors import FailedPrecondition
from mint_core.lora.columns import ColumnBank
from mint_core.lora.kernels import TILE
from mint_core.lora.spec import LoraRequest
from mint_core.model.inference import make_row_wise
from sampler_service.engine import neighbours
from sampler_service.engine.cache.paged_attention import plain_attention
from sampler_service.engine.row_passes import RowPasses, fitting
from sampler_service.engine.sequences import Span, TokenSequence
from sampler_service.jobs import BASE_MODEL
from tests.families import named
from tests.models import load_base
from tests.parity.sampler_checks import assert_bitwise, random_tokens
from tests.parity.test_decoder import assert_near, decoding, launches_of
from tests.sampler_in_process import SamplerEngine
from tests.unit.mint_core.test_columns import GROUPS, make_rows

pytest.importorskip("tests.interpreted_kernels")
from tests.interpreted_kernels import in_kernels, products_by_rows

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="test_sampler_gpu.py does this with compiled ones"
)
EIGHT, THREE = (f"mint://run/sampler_weights/rank-{rank}@1" for rank in (8, 3))
REQUESTS = {
    EIGHT: LoraRequest(rank=8),
    THREE: LoraRequest(rank=3, train_mlp=False, alpha=16),
}
# Of a length, an adapter, and ways to draw; blocks have 16 tokens.
WISHES: tuple[dict[str, Any], ...] = (
    {"prompt": random_tokens(1, 20), "num_samples": 2, "seed": 1, "topk_sample_logprobs": 3},
    {"prompt": random_tokens(2, 7), "adapter": EIGHT, "seed": 2, "prompt_logprobs": True},
    {"prompt": random_tokens(3, 2), "adapter": THREE, "seed": 3, "top_p": 0.8, "top_k": 40},
    {
        "prompt": random_tokens(4, 1),
        "adapter": EIGHT,
        "seed": 4,
        "temperature": 0.6,
        "stream": True,
    },
)


def load_all(sampler: SamplerEngine) -> SamplerEngine:
    for seed, (path, request) in enumerate(REQUESTS.items()):
        sampler.load(path, request, random=seed)
    return sampler


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_hidden_layers": 1, "intermediate_size": 32, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return named("Qwen 3").make(tmp_path_factory.mktemp("model"), **sizes)


class OnGpu(SamplerEngine):
    """As there. The cache is small: attention in the interpreter takes as long as it may hold."""

    def __init__(self, folder: Path) -> None:
        with in_kernels(), products_by_rows():
            super().__init__(folder, batch_invariant=True, kv_cache_tokens=128)

    def step(self) -> None:
        with in_kernels(), products_by_rows():
            super().step()


@pytest.fixture(scope="module")
def sampler(folder: Path) -> Iterator[SamplerEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "BESIDE", 4)
        patch.setattr(neighbours, "PROMPTS", (("", 2), ("narrow", 4), ("wide", 2)))
        yield load_all(OnGpu(folder))


def assert_same(sampler: SamplerEngine, left: Sequence[int], right: Sequence[int]) -> None:
    """What calls of these numbers were told, in parts and at the end."""
    for ours, theirs in zip(left, right, strict=True):
        assert sampler.parts.get(ours) == sampler.parts.get(theirs)
        assert_bitwise(sampler.answer(ours), sampler.answer(theirs))


def together(sampler: SamplerEngine, tenant: str) -> list[int]:
    """They come in two steps, and another that goes away between them."""
    numbers = []
    for place, wish in enumerate(WISHES):
        numbers.append(sampler.submit(**wish, tenant=tenant, max_tokens=2))
        if place == 1:
            gone = sampler.submit(random_tokens(9, 5), adapter=THREE, tenant=tenant)
            sampler.step()
            sampler.abort(gone)
    sampler.drain()
    return numbers


def test_a_seed_gives_the_same_bits_alone_and_beside_others(
    sampler: SamplerEngine, folder: Path
) -> None:
    assert sampler.model.bitwise_reproducible
    decoder = sampler.engine.runner.decoder
    assert decoder is not None
    assert not decoder._columns._starts  # those that were tried at start hold no memory
    alone = []
    for wish in WISHES:
        alone.append(sampler.submit(**wish, tenant="a", max_tokens=2))
        sampler.drain()
    # Of another tenant, which finds nothing of those; but a beginning of its own, of one block.
    sampler.generate(WISHES[0]["prompt"][:17], tenant="b", max_tokens=1)
    beside = together(sampler, "b")
    first = sampler.generate(**WISHES[0], tenant="b", max_tokens=2)  # all of it is found now
    plain = load_all(SamplerEngine(folder))
    assert_near([first], [plain.generate(**WISHES[0], max_tokens=2)])
    found = sampler.answer(alone[0]), sampler.answer(beside[0])
    assert [each.prompt_cache_hit_tokens for each in (*found, first)] == [0, 16, 19]
    for other in (*found[1:], first):
        assert_bitwise(found[0], other)
    assert sampler.parts[alone[3]]
    assert_same(sampler, alone[1:], beside[1:])


def test_who_was_sent_away_goes_on_with_the_same_bits(sampler: SamplerEngine) -> None:
    wish = {"prompt": random_tokens(7, 2), "adapter": EIGHT, "max_tokens": 3, "seed": 7}
    expected = sampler.generate(**wish, tenant="g")  # type: ignore[arg-type]
    number = sampler.submit(**wish, tenant="h")  # type: ignore[arg-type]
    scheduler = sampler.engine._scheduler
    sampler.step()
    (own,) = scheduler._requests[number].sequences
    while len(own.generated) < 2:
        sampler.step()
        (own,) = scheduler._requests[number].sequences
    scheduler._preempt(own)  # as for want of blocks
    assert own.missing > 1
    assert_bitwise(expected, sampler.answer(number))


def test_a_pass_has_as_many_rows_and_adapters_as_it_takes() -> None:
    rows = make_rows()[:3]  # each takes a tile of columns
    bank = ColumnBank(GROUPS, 2 * TILE, torch.device("cpu"), torch.float32, row_wise=True)
    adapters = dict(zip("abc", rows, strict=True))
    lengths = {"a": 5, "": 1, "b": 1, "c": 6}
    spans = [
        Span(TokenSequence(0, 0, adapter, [0] * n), 0, n, decodes=False)
        for adapter, n in lengths.items()
    ]
    parts = list(fitting(spans, adapters, bank, 4))
    told = [[(span.sequence.adapter, span.start, span.stop) for span in part] for part in parts]
    assert told == [
        [("a", 0, 4)],
        [("a", 4, 5), ("", 0, 1), ("b", 0, 1)],
        [("c", 0, 4)],
        [("c", 4, 6)],
    ]


def test_more_adapters_than_columns_hold_are_computed_apart(sampler: SamplerEngine) -> None:
    wishes = [
        {"prompt": random_tokens(6, 2), "adapter": adapter, "max_tokens": 1, "seed": 5}
        for adapter in (BASE_MODEL, EIGHT, THREE)
    ]
    expected = [sampler.generate(**wish, tenant="e") for wish in wishes]  # type: ignore[arg-type]
    runner = sampler.engine.runner
    kept = runner.decoder
    with in_kernels():
        decoder = decoding(sampler, columns=32)
    numbers = [sampler.submit(**wish, tenant="f") for wish in wishes]  # type: ignore[arg-type]
    apart = [sampler.answer(number) for number in numbers]
    runner.decoder = kept
    assert {columns for _, columns in decoder.recordings.passes} == {32}
    for left, right in zip(expected, apart, strict=True):
        assert_bitwise(left, right)


def test_the_option_launches_no_more_where_no_splits_are(
    sampler: SamplerEngine, folder: Path
) -> None:
    from tests.launches import counted

    decoder = sampler.engine.runner.decoder
    assert decoder is not None
    assert decoder.sums.row_wise
    columns = decoder._columns.admit([sampler.row(EIGHT)])
    assert columns
    with torch.no_grad(), counted() as launches:
        decoder._rows.fill([], [], 1)
        launches.counts.clear()
        decoder._compute(1, columns)
    products = [launches.counts[name] for name in ("multiply_split", "shrink", "expand")]
    assert products == [5, 5, 5]  # q with k and v, o, gate with up, down, and the head
    assert not {"mm", "addmm", "matmul", "mean"} & set(launches.counts)
    assert sum(launches.counts.values()) <= sum(launches_of(folder, 1).values())


def test_a_device_on_which_neighbours_tell_is_refused(folder: Path) -> None:
    def attend(query: Tensor, *others: Any) -> Tensor:
        return plain_attention(query, *others) * (1 + 1e-3 * len(query))

    plain = SamplerEngine(folder)
    base, cache = plain.engine.base, plain.engine.runner.cache
    decoder = decoding(plain, attend=attend)
    decoder.row_passes = RowPasses(base, cache, lambda _: attend, decoder._columns)
    with pytest.raises(FailedPrecondition, match="is not kept on this device"):
        neighbours.prove(base, decoder)


@pytest.mark.parametrize(
    ("family", "what"),
    [
        ("Qwen 3 MoE", "its experts take the rows"),
        ("LFM2", "it has layers with state"),
        ("Phi-3", r"its `layers\.0` is computed by the model's own code"),
    ],
)
def test_models_with_parts_that_cannot_are_refused(family: str, what: str, tmp_path: Path) -> None:
    base = load_base(named(family).make(tmp_path))
    with pytest.raises(FailedPrecondition, match=what):
        make_row_wise(base)


def test_on_a_cpu_it_is_what_is_always_so(folder: Path) -> None:
    plain, told = (SamplerEngine(folder, batch_invariant=asked) for asked in (False, True))
    assert told.model == plain.model
    assert told.model.bitwise_reproducible
    assert_bitwise(plain.generate(WISHES[0]["prompt"]), told.generate(WISHES[0]["prompt"]))
    with pytest.raises(FailedPrecondition, match="it takes `threads` 1"):
        SamplerEngine(folder, batch_invariant=True, threads=2)
