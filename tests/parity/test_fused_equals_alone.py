"""A run's numbers do not depend on who else is in the pass: bitwise on CPU (design section 11)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mint_core.lora.segments import Segment
from mint_core.lora.spec import LoraRequest
from mint_core.model.attention import PackedAttention
from tests.engines_in_process import (
    EngineRun,
    RowArrays,
    for_loss,
    make_documents,
    make_engine,
    run_plan,
    wide_documents,
)
from trainer_service.engine.engine import Engine, _deterministic
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
    TileResult,
)

STEPS = 20
REQUESTS = [
    LoraRequest(rank=1, seed=1, train_unembed=False),
    LoraRequest(rank=8, seed=2),
    LoraRequest(rank=13, seed=3, train_attn=False, use_rslora=True),
    LoraRequest(rank=32, seed=4, alpha=64.0),
    LoraRequest(rank=8, seed=5, train_mlp=False),
    LoraRequest(rank=64, seed=6, alpha=16.0, train_attn=False, train_mlp=False),
    LoraRequest(rank=3, seed=7, target_modules=("q_proj", "down_proj")),
    LoraRequest(rank=24, seed=8, use_rslora=True),
]
LOSSES: list[Loss] = [
    *(CrossEntropy(), ImportanceSampling(), Ppo(), Cispo(), Dro(0.1)),
    *(CrossEntropy(), Ppo(clip_low_threshold=0.9, clip_high_threshold=1.1), Gspo(0.2, 5.0)),
]
WIDE = {5: 3, 0: 1}  # targets at each position, by run; the others have one in a row of its own
LENGTHS = [(1,), (3, 40), (17, 2, 9), (64,), (5, 5), (30, 30, 30), (2, 1, 1, 7)]


@pytest.fixture(scope="module")
def engine(qwen3_folder: Path) -> Engine:
    return make_engine(qwen3_folder)


def data(run: int, step: int) -> tuple[Document, ...]:
    seed, lengths = 100 * run + step, LENGTHS[(run + step) % len(LENGTHS)]
    if run in WIDE:
        return wide_documents(seed, lengths, WIDE[run])
    return for_loss(make_documents(seed, lengths), LOSSES[run])


def equal(ours: RowArrays, theirs: RowArrays) -> bool:
    pairs = [(ours.weights, theirs.weights), (ours.exp_avg, theirs.exp_avg)]
    return all(
        a is not None
        and b is not None
        and a.keys() == b.keys()
        and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in pairs
    )


def train_together(engine: Engine, runs: Sequence[EngineRun]) -> list[list[TileResult]]:
    history: list[list[TileResult]] = [[] for _ in runs]
    for step in range(STEPS):
        tiles = [run.tile(data(i, step), LOSSES[i]) for i, run in enumerate(runs)]
        order = np.random.default_rng(step).permutation(len(runs))
        results = run_plan(engine, *[tiles[i] for i in order])
        for i, result in zip(order, results, strict=True):
            history[i].append(result)
            runs[i].step(AdamParams(learning_rate=1e-2))
    return history


def test_eight_runs_fused_equal_each_alone(engine: Engine) -> None:
    fused = [EngineRun(engine, f"fused{i}", r, random=i) for i, r in enumerate(REQUESTS)]
    together = train_together(engine, fused)
    for i, request in enumerate(REQUESTS):
        alone = EngineRun(engine, f"alone{i}", request, random=i)
        for step in range(STEPS):
            result = alone.compute(alone.tile(data(i, step), LOSSES[i]))
            assert result.metrics == together[i][step].metrics
            for a, b in zip(result.logprobs, together[i][step].logprobs, strict=True):
                assert np.array_equal(a, b)
            alone.step(AdamParams(learning_rate=1e-2))
        assert equal(alone.export(), fused[i].export()), request


def test_a_forward_only_tile_changes_no_gradient_and_gets_the_same_logprobs(
    engine: Engine,
) -> None:
    trained = EngineRun(engine, "trained", REQUESTS[1], random=1)
    watched = EngineRun(engine, "watched", REQUESTS[3], random=2)
    documents = make_documents(5, (9, 20))
    before = watched.export()
    fused = run_plan(
        engine,
        watched.tile(documents, CrossEntropy(), backward=False),
        trained.tile(documents, CrossEntropy()),
    )
    alone = watched.compute(watched.tile(documents, CrossEntropy(), backward=False))
    assert all(np.array_equal(a, b) for a, b in zip(fused[0].logprobs, alone.logprobs, strict=True))
    assert watched.step(AdamParams()).grad_norm == 0.0
    assert equal(watched.export(), before)


def test_an_isolated_pass_has_the_same_bits_and_leaves_torch_as_it_was(engine: Engine) -> None:
    documents = make_documents(9, (12, 3))
    exports = []
    for isolated in (False, True):
        run = EngineRun(engine, f"isolated{isolated}", REQUESTS[1], random=1)
        run.compute(run.tile(documents, CrossEntropy(), isolated=isolated))
        run.step(AdamParams())
        exports.append(run.export())
    assert equal(*exports)
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_algorithms_end_with_the_pass_however_it_ends() -> None:
    @_deterministic(True)
    def fail() -> None:
        assert torch.are_deterministic_algorithms_enabled()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_full_of_nan_touches_none_of_seven_others(engine: Engine) -> None:
    runs = [EngineRun(engine, f"nan{i}", request, random=i) for i, request in enumerate(REQUESTS)]
    broken = runs[1]
    broken.compute(broken.tile(data(1, 0), LOSSES[1]))
    assert (
        broken.step(AdamParams(learning_rate=3e38, weight_decay=1e3), replayed=True).error is None
    )
    tiles = [run.tile(data(i, 0), LOSSES[i]) for i, run in enumerate(runs)]

    results = run_plan(engine, *tiles)

    assert results[1].error is not None
    assert results[1].error.reason == "LOSS_NOT_FINITE"
    refused = broken.step(AdamParams())
    assert refused.error is not None
    assert refused.error.reason == "GRADIENT_NOT_FINITE"
    assert refused.step == 1
    for i, run in enumerate(runs):
        if run is broken:
            continue
        alone = EngineRun(engine, f"nan-alone{i}", REQUESTS[i], random=i)
        expected = alone.compute(alone.tile(data(i, 0), LOSSES[i]))
        assert results[i].metrics == expected.metrics
        run.step(AdamParams())
        alone.step(AdamParams())
        assert equal(run.export(), alone.export()), REQUESTS[i]


def test_targets_at_weight_0_contribute_exactly_nothing(engine: Engine) -> None:
    """Requirements 12 and 13."""
    exports = []
    for junk in (False, True):
        run = EngineRun(engine, f"junk{junk}", REQUESTS[1], random=1)
        documents = make_documents(7, (30, 11))
        if junk:
            for document in documents:
                prompt = document.weights == 0
                document.targets[prompt] = (document.targets[prompt] + 17) % 512
        result = run.compute(run.tile(documents, CrossEntropy()))
        run.step(AdamParams())
        exports.append((run.export(), result.metrics["loss:sum"]))
    assert equal(exports[0][0], exports[1][0])
    assert exports[0][1] == exports[1][1]


def test_gradients_of_several_backwards_add_up_and_are_cleared_by_the_step(
    engine: Engine,
) -> None:
    """Requirement 48."""
    documents = make_documents(8, (20, 6))
    split = EngineRun(engine, "split", REQUESTS[1], random=1)
    whole = EngineRun(engine, "whole", REQUESTS[1], random=1)
    for document in documents:
        split.compute(split.tile([document], CrossEntropy()))
    whole.compute(whole.tile(documents, CrossEntropy()))
    a, b = split.step(AdamParams()), whole.step(AdamParams())
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    assert split.step(AdamParams()).grad_norm == 0.0


@pytest.mark.parametrize("passes", [((0, 1, 2, 3),), ((0, 1), (2, 3)), ((0,), (1, 2), (3,))])
def test_how_tiles_fall_into_passes_changes_no_bit(
    engine: Engine, passes: Sequence[Sequence[int]]
) -> None:
    """So a row is restored to the bit, whatever shares its passes then."""
    name = "".join(str(len(each)) for each in passes)
    grouped, alone = (EngineRun(engine, f"{n}{name}", REQUESTS[3], random=4) for n in ("g", "a"))
    stranger = EngineRun(engine, f"s{name}", REQUESTS[1], random=5)
    for step in range(3):
        documents = [make_documents(10 * step + i, (17, 3 + i)) for i in range(4)]
        for group in passes:
            tiles = [grouped.tile(documents[i], LOSSES[0]) for i in group]
            run_plan(engine, tiles[0], stranger.tile(documents[0], LOSSES[0]), *tiles[1:])
        for each in documents:
            alone.compute(alone.tile(each, LOSSES[0]))
        assert grouped.step(AdamParams()) == alone.step(AdamParams())
    assert equal(grouped.export(), alone.export())


def test_save_load_continue_equals_never_stopped(engine: Engine) -> None:
    """With optimizer bitwise; without it visibly different."""
    runs = {
        n: EngineRun(engine, f"resume-{n}", REQUESTS[3], random=4) for n in ("a", "with", "without")
    }

    def advance(run: EngineRun, steps: range) -> None:
        for step in steps:
            run.compute(run.tile(data(1, step), CrossEntropy()))
            run.step(AdamParams(learning_rate=1e-2))

    advance(runs["a"], range(3))
    saved = runs["a"].export()
    assert saved.step == 3
    runs["with"].load(saved)
    runs["without"].load(RowArrays(weights=saved.weights))
    for run in runs.values():
        advance(run, range(3, 5))
    exports = {name: run.export() for name, run in runs.items()}
    assert exports["a"].step == exports["with"].step == 5
    assert exports["without"].step == 2
    assert equal(exports["a"], exports["with"])
    assert not equal(exports["a"], exports["without"])


def test_a_pass_that_trains_the_head_alone_keeps_nothing_below_it(engine: Engine) -> None:
    heads = LoraRequest(rank=8, seed=0, train_attn=False, train_mlp=False)
    row = engine.base.new_bank().add(EngineRun(engine, "head-alone", heads).spec)
    tokens = torch.arange(12)
    hidden = engine.base.hidden(
        tokens, tokens, (Segment(0, 12, row, accumulate=True),), PackedAttention([0, 12])
    )
    assert not hidden.requires_grad


@pytest.mark.parametrize(
    ("request_", "loss"),
    [
        (LoraRequest(rank=8, seed=1, alpha=1e308), CrossEntropy()),
        (LoraRequest(rank=8, seed=1, alpha=1e300, use_rslora=True), CrossEntropy()),
        (LoraRequest(rank=8, seed=1, alpha=1e308, train_attn=False, train_mlp=False), Ppo()),
        (REQUESTS[0], Dro(1e308)),
        (REQUESTS[0], Cispo(1e300, 1e308)),
    ],
)
def test_numbers_that_no_float32_holds_are_one_calls_error(
    engine: Engine, request_: LoraRequest, loss: Loss
) -> None:
    odd = EngineRun(engine, "odd", request_)
    neighbour, alone = (
        EngineRun(engine, n, REQUESTS[1], random=4) for n in ("beside", "by itself")
    )
    documents = make_documents(3, (17, 5))

    results = run_plan(engine, odd.tile(documents, loss), neighbour.tile(documents, LOSSES[1]))

    assert results[0].error is not None
    assert results[0].error.reason == "LOSS_NOT_FINITE"
    expected = alone.compute(alone.tile(documents, LOSSES[1]))
    assert results[1].metrics == expected.metrics
    assert neighbour.step(AdamParams()) == alone.step(AdamParams())
    assert equal(neighbour.export(), alone.export())


@pytest.mark.parametrize("loss", [Ppo(0.8, 1e39), Cispo(0.0, 1.7e308), Gspo(0.2, 1e308)], ids=str)
def test_a_threshold_that_no_float32_holds_clips_nothing(engine: Engine, loss: Loss) -> None:
    documents = for_loss(make_documents(3, (17, 5)), loss)
    run = EngineRun(engine, "unclipped", REQUESTS[1])
    found = [
        run.compute(run.tile(documents, replaced)).metrics
        for replaced in (loss, dataclasses.replace(loss, clip_high_threshold=3e38))
    ]
    assert found[0] == found[1]
