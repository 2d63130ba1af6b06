"""What a pass is computed to take against what it takes, and recomputed passes against others."""

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.profiler import profile

from mint_core.errors import FailedPrecondition
from mint_core.lora.spec import LoraRequest
from tests.checkpoint_files import same
from tests.engines_in_process import EngineRun, make_documents, make_engine, wide_documents
from tests.models import tiny_gemma2, tiny_mistral, tiny_qwen3
from trainer_service.engine.engine import Engine
from trainer_service.engine.memory import ActivationMemory, Lengths, lengths, measure
from trainer_service.jobs import AdamParams, CrossEntropy, Document, TileResult

RANK = 16
LENGTH = 700  # tokens: more than one block of queries
MEMORY = ActivationMemory(
    saved_bytes=1000,
    layer_bytes=100,
    input_bytes=10,
    logits_bytes=400,
    chunk_rows=256,
    score_bytes=0,
    layers=10,
)


@pytest.fixture(scope="module", params=[tiny_qwen3, tiny_mistral, tiny_gemma2])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    make: Callable[[Path], Path] = request.param
    return make_engine(make(tmp_path_factory.mktemp("model")), max_lora_rank=RANK)


def recompute(engine: Engine, on: bool) -> None:
    kept = 0 if on else engine.description.context_length
    engine.lengths = Lengths(1024, kept, engine.description.context_length)


def peak_bytes(run: EngineRun, *documents: Document) -> int:
    """Most that torch's allocator held at once during a pass."""
    tile = run.tile(documents, CrossEntropy())
    gc.disable()  # what earlier tests left, if it went meanwhile, would count against the peak
    try:
        with profile(profile_memory=True) as profiler:
            run.compute(tile)
    finally:
        gc.enable()
    assert profiler.kineto_results is not None  # as they are: to parse them takes seconds
    events = profiler.kineto_results.events()
    held = np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"])
    return int(held.max())


def test_a_pass_takes_what_was_computed(engine: Engine, request: pytest.FixtureRequest) -> None:
    """Between 0.95 and 1.5 of the peak; recomputed up to 2, since a layer's share and its gradients
    are all of these two layers.
    """
    memory = measure(engine.base, RANK)
    run = EngineRun(engine, request.node.name, LoraRequest(rank=RANK, seed=1), random=1)
    run.compute(run.tile(make_documents(1, (8,)), CrossEntropy()))  # makes the row's gradient
    for tokens in (60, LENGTH):
        recompute(engine, on=False)
        kept = peak_bytes(run, *make_documents(1, (tokens,)))
        assert 0.95 * kept <= memory.pass_bytes(tokens) <= 1.5 * kept
        recompute(engine, on=True)
        recomputed = peak_bytes(run, *make_documents(1, (tokens,)))
        assert 0.95 * recomputed <= memory.recomputed_pass_bytes(tokens) <= 2 * recomputed
        assert recomputed < kept


@pytest.mark.parametrize(("tokens", "k"), [(8, 5000), (60, 600)])
def test_many_targets_take_no_more_than_what_they_cost_is_computed_to(
    engine: Engine, request: pytest.FixtureRequest, tokens: int, k: int
) -> None:
    run = EngineRun(engine, request.node.name, LoraRequest(rank=RANK, seed=1), random=1)
    recompute(engine, on=False)
    run.compute(run.tile(make_documents(1, (8,)), CrossEntropy()))  # makes the row's gradient
    memory = measure(engine.base, RANK)
    (wide,) = wide_documents(1, (tokens,), k)

    assert wide.cost > 1.5 * tokens
    assert peak_bytes(run, wide) <= memory.pass_bytes(wide.cost)


def test_a_recomputed_pass_gives_the_same_bits(engine: Engine) -> None:
    results: list[TileResult] = []
    gradients, weights = [], []
    for on in (False, True):
        run = EngineRun(engine, f"recompute-{on}", LoraRequest(rank=RANK, seed=1), random=1)
        recompute(engine, on)
        results.append(run.compute(run.tile(make_documents(2, (LENGTH,)), CrossEntropy())))
        gradients.append(run.gradient())
        run.step(AdamParams(learning_rate=1e-2))
        weights.append(run.export().weights)
    assert results[0].metrics == results[1].metrics
    assert np.array_equal(results[0].logprobs[0], results[1].logprobs[0])
    assert any(array.any() for array in gradients[0].values())
    assert same(*gradients)
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_pass_is_recomputed_only_beyond_what_is_kept(engine: Engine) -> None:
    run = EngineRun(engine, "switch", LoraRequest(rank=RANK, seed=1))
    engine.lengths = Lengths(16, 20, 4096)
    for tokens, on in ((20, False), (21, True), (4, False)):
        run.compute(run.tile(make_documents(3, (tokens,)), CrossEntropy()))
        assert engine.base.recomputation.on is on


def test_little_memory_bounds_the_context_that_the_server_names(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(available=40 * 2**20, total=2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    engine = make_engine(qwen3_folder, max_lora_rank=RANK)
    assert engine.base.description.context_length == 4096
    assert engine.description.context_length == engine.lengths.document_tokens < 4096
    assert engine.description.memory_bound
    assert engine.max_batch_tokens <= engine.lengths.kept_tokens < engine.lengths.document_tokens


def test_memory_that_holds_no_token_is_refused_at_start() -> None:
    with pytest.raises(FailedPrecondition, match="a pass over one token needs"):
        lengths(MEMORY, 1000, "cpu")


@given(budget=st.integers(MEMORY.recomputed_pass_bytes(1), 10**11))
def test_lengths_fill_a_budget_and_never_exceed_it(budget: int) -> None:
    found = lengths(MEMORY, budget, "cpu")
    if found.kept_tokens:
        assert MEMORY.pass_bytes(found.kept_tokens) <= budget
    assert MEMORY.pass_bytes(found.kept_tokens + 1) > budget
    assert MEMORY.recomputed_pass_bytes(found.document_tokens) <= budget
    assert MEMORY.recomputed_pass_bytes(2 * found.document_tokens) > budget
    assert 1 <= found.max_batch_tokens <= min(1024, max(1, found.kept_tokens))
