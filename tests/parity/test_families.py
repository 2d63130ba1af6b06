"""Every row of docs/models.md: what is served against PEFT, against transformers and against itself
alone; what is not is refused by name.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel

from mint_chat import RENDERER_NAMES
from mint_core.errors import FailedPrecondition
from mint_core.lora.spec import LoraRequest
from mint_core.model.tested import TESTED
from sampler_service.engine.cache.blocks import BLOCK_TOKENS
from tests.engines_in_process import (
    EngineRun,
    for_loss,
    make_documents,
    make_engine,
    manifest_of,
    run_plan,
    save,
    score,
)
from tests.families import FAMILIES, named
from tests.families.page import page
from tests.families.renderers import COMPARED
from tests.family import Family, params
from tests.models import VOCABULARY_SIZE, load_base, own_model
from tests.parity.peft_oracle import PeftTrainer
from tests.parity.sampler_checks import assert_same_but_for_ties
from tests.sampler_in_process import SamplerEngine
from trainer_service.checkpoints.apart import Merge
from trainer_service.engine.engine import Engine
from trainer_service.engine.merging import merge
from trainer_service.jobs import AdamParams, CrossEntropy, Ppo, SaveCheckpoint

# PEFT warns that an adapter on a tied head leaves the embedding as it is, which is what we want.
pytestmark = pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning")

TOLERANCE = 1e-5
PATH = "mint://r-1/sampler_weights/all@1"
REQUESTS = (LoraRequest(rank=4, seed=1, alpha=8.0), LoraRequest(rank=8, seed=2, use_rslora=True))
PROMPT = np.random.default_rng(1).integers(3, VOCABULARY_SIZE, 3 * BLOCK_TOKENS + 5)


@dataclass
class Served:
    """A family's model in both engines, each made when it is first asked for."""

    row: Family
    folder: Path

    @cached_property
    def trainer(self) -> Engine:
        return make_engine(self.folder)

    @cached_property
    def sampler(self) -> SamplerEngine:
        return SamplerEngine(self.folder)

    @cached_property
    def run(self) -> EngineRun:
        """With random weights in every layer."""
        return EngineRun(self.trainer, "run", REQUESTS[0], random=2)


@pytest.fixture(scope="module", params=params([f for f in FAMILIES if f.served]))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    known: Family = request.param
    return Served(known, known.make(tmp_path_factory.mktemp(known.id)))


def distance(ours: NDArray[np.float32], oracle: torch.Tensor) -> float:
    """Norm of the difference over the norm of the oracle's."""
    expected = oracle.detach().numpy()
    return float(np.linalg.norm(ours - expected) / max(np.linalg.norm(expected), 1e-12))


def test_training_equals_peft(family: Served) -> None:
    run = EngineRun(family.trainer, "trained", REQUESTS[0], random=2)
    tolerance = family.row.tolerance
    oracle = PeftTrainer(family.folder, run.spec, run.export().weights)
    params = AdamParams(learning_rate=3e-3, weight_decay=0.02, grad_clip_norm=2.0, eps=1e-4)
    assert family.trainer.base.description.text_only is family.row.reads_more_than_text
    for step, loss in enumerate((CrossEntropy(), Ppo())):
        documents = for_loss(make_documents(step, (7, 33, 2, 18)), loss)
        result = run.compute(run.tile(documents, loss))
        oracle.loss(loss, documents).backward()
        for ours, document in zip(result.logprobs, documents, strict=True):
            assert distance(ours, oracle.logprobs(document)) < tolerance
        gradient = run.gradient()
        for name in oracle.names:
            assert distance(gradient[name], oracle.gradient(name)) < tolerance, name
        run.step(params)
        oracle.step(params)
    for name, weights in run.export().weights.items():
        assert distance(weights, oracle.parameters[name.replace(".weight", ".default.weight")]) < (
            tolerance
        ), name


def neighbours_change_no_bit(trainer: Engine, *lengths: Sequence[int]) -> None:
    """Of runs with documents of these lengths each."""

    def trained(name: str, seed: int) -> EngineRun:
        return EngineRun(trainer, name, REQUESTS[seed % 2], random=seed)

    assert trainer.base.description.bitwise_reproducible
    together = [trained(f"together{i}", i) for i in range(len(lengths))]
    tiles = [
        each.tile(make_documents(i, lengths[i]), CrossEntropy()) for i, each in enumerate(together)
    ]
    fused = run_plan(trainer, *tiles)
    for i, tile in enumerate(tiles):
        alone = trained(f"alone{i}", i)
        result = alone.compute(dataclasses.replace(tile, training_run_id=alone.name))
        assert result.metrics == fused[i].metrics
        assert alone.step(AdamParams()) == together[i].step(AdamParams())
        weights = together[i].export().weights
        for name, array in alone.export().weights.items():
            assert np.array_equal(array, weights[name]), name


def test_neighbours_change_no_bit(family: Served) -> None:
    neighbours_change_no_bit(family.trainer, (3, 40), (3, 40))
    assert family.sampler.model.bitwise_reproducible


# Widths that fill no whole vectors: of MLPs, and gates of one number for each head.
ODD = {
    "Llama": {"intermediate_size": 100},
    "StarCoder2": {"intermediate_size": 100},
    "EXAONE MoE": {"intermediate_size": 76, "moe_intermediate_size": 20, "num_shared_experts": 1},
    "Laguna": {"gating": True, "num_attention_heads_per_layer": [4, 6, 2]},
    "LFM3": {"num_attention_heads": 6},
}


@pytest.mark.parametrize("name", ODD)
def test_neighbours_change_no_bit_of_narrow_layers(name: str, tmp_path: Path) -> None:
    folder = named(name).make(tmp_path, **ODD[name])
    neighbours_change_no_bit(make_engine(folder), *((n,) for n in (5, 6, 7, 4, 9, 13, 11, 45)))
    sampler = SamplerEngine(folder)
    assert sampler.model.bitwise_reproducible
    wishes = [{"prompt": PROMPT[:n], "max_tokens": 9, "seed": n} for n in (5, 6, 7, 31, 13)]
    numbers = [sampler.submit(**wish) for wish in wishes]  # type: ignore[arg-type]
    together = [sampler.answer(number).continuations[0] for number in numbers]
    for wish, beside in zip(wishes, together, strict=True):
        fresh = SamplerEngine(folder)  # whose cache is empty
        alone = fresh.answer(fresh.submit(**wish)).continuations[0]  # type: ignore[arg-type]
        assert alone.tokens.tolist() == beside.tokens.tolist()
        assert list(alone.model_logprobs) == list(beside.model_logprobs)


def saved(family: Served, run: EngineRun, folder: Path) -> Path:
    """A run's adapter, as it is published."""
    folder.mkdir()
    manifest = manifest_of(run.name, run.spec)
    save(
        family.trainer,
        SaveCheckpoint(manifest=manifest, folder=str(folder), with_optimizer=False),
    )
    return folder


def own_logprobs(model: Any) -> NDArray[np.float32]:
    """What transformers, or PEFT, says of the prompt."""
    tokens = torch.from_numpy(PROMPT)
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens[None]).logits[0, :-1]
    found: NDArray[np.float32] = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0].numpy()
    return found


def test_merged_models_open_in_transformers(family: Served, tmp_path: Path) -> None:
    run, merged = family.run, tmp_path / "merged"
    merged.mkdir()
    merge(
        Merge(
            base_folder=str(family.folder),
            adapter_folder=str(saved(family, run, tmp_path / "adapter")),
            spec=run.spec,
            output_folder=str(merged),
            dtype="",
            threads=1,
        )
    )
    ours = score(family.trainer, PROMPT, run.spec, run.export(False).weights)
    np.testing.assert_allclose(ours, own_logprobs(own_model(merged)), atol=TOLERANCE)


def test_adapters_open_in_peft(family: Served, tmp_path: Path) -> None:
    everything = family.row.peft_opens_mlps
    request = dataclasses.replace(REQUESTS[0], train_mlp=everything)
    if family.row.gated_attention:
        projections = ("q_proj", "k_proj", "v_proj", "o_proj")
        request = dataclasses.replace(REQUESTS[0], target_modules=projections)
    run = EngineRun(family.trainer, "published", request, random=2)
    adapter = saved(family, run, tmp_path / "adapter")
    model = PeftModel.from_pretrained(own_model(family.folder), adapter)
    ours = score(family.trainer, PROMPT, run.spec, run.export(False).weights)
    np.testing.assert_allclose(ours, own_logprobs(model), atol=TOLERANCE)


STARRED = [family for family in FAMILIES if not family.peft_opens_mlps]


@pytest.mark.filterwarnings("ignore")  # PEFT warns of some, and takes them nevertheless
@pytest.mark.parametrize("starred", params(STARRED))
def test_adapters_of_mlps_open_in_no_peft_where_the_page_says_so(
    starred: Family, tmp_path: Path
) -> None:
    """So that the page follows when PEFT does."""
    family = Served(starred, starred.make(tmp_path / "base"))
    adapter = saved(family, family.run, tmp_path / "adapter")
    ours = score(family.trainer, PROMPT, family.run.spec, family.run.export(False).weights)
    try:
        model = PeftModel.from_pretrained(own_model(family.folder), adapter)
    except (ValueError, RuntimeError):
        return
    assert np.abs(ours - own_logprobs(model)).max() > 100 * TOLERANCE


def test_the_sampler_scores_as_the_trainer_does(family: Served) -> None:
    """Whole, decoded from the cache, and beside a beginning that is found in it."""
    weights = family.run.export(False).weights
    sampler = family.sampler
    assert sampler.model.fingerprint == family.trainer.base.description.fingerprint
    sampler.load_arrays(PATH, family.run.spec, weights)
    for prompt in (PROMPT, PROMPT, np.concatenate([PROMPT, PROMPT])):
        generated = sampler.generate(prompt, adapter=PATH, max_tokens=12, prompt_logprobs=True)
        (continuation,) = generated.continuations
        trained = score(family.trainer, [*prompt, *continuation.tokens], family.run.spec, weights)
        assert generated.prompt_logprobs is not None
        sampled = [*generated.prompt_logprobs, *continuation.model_logprobs]
        np.testing.assert_allclose(sampled, trained, atol=TOLERANCE)
        again = sampler.generate(prompt, adapter=PATH, max_tokens=12)
        assert again.prompt_cache_hit_tokens >= BLOCK_TOKENS
        assert again.continuations[0].tokens.tolist() == continuation.tokens.tolist()


def test_what_was_sent_away_is_computed_again(family: Served) -> None:
    wishes = [{"prompt": PROMPT[: 40 - i], "max_tokens": 30, "seed": i} for i in range(4)]
    tight = SamplerEngine(family.folder, kv_cache_tokens=10 * BLOCK_TOKENS)
    both = []
    for engine in (tight, family.sampler):
        numbers = [engine.submit(**wish) for wish in wishes]  # type: ignore[arg-type]
        both.append([engine.answer(number) for number in numbers])
    for wish, ours, theirs in zip(wishes, *both, strict=True):
        assert_same_but_for_ties(family.folder, wish, ours, theirs, TOLERANCE)


def test_what_parts_where_no_tie_is_is_not_the_same(tmp_path: Path) -> None:
    folder = named("Qwen 3").make(tmp_path)
    wish: dict[str, Any] = {"prompt": PROMPT[:9], "max_tokens": 20, "seed": 3}
    found = SamplerEngine(folder).generate(**wish)
    assert_same_but_for_ties(folder, wish, found, found, 0.0)
    tokens = found.continuations[0].tokens.copy()
    tokens[7] += 1
    other = dataclasses.replace(found.continuations[0], tokens=tokens)
    parted = dataclasses.replace(found, continuations=(other,))
    with pytest.raises(AssertionError):
        assert_same_but_for_ties(folder, wish, found, parted, 0.0)


@pytest.mark.parametrize("refused", params([f for f in FAMILIES if not f.served]))
def test_what_is_not_served_is_refused_by_name(refused: Family, tmp_path: Path) -> None:
    folder = refused.make(tmp_path)
    words = f"{refused.architecture} is not supported: {re.escape(refused.own)}"
    with pytest.raises(FailedPrecondition, match=words):
        load_base(folder)


EARLIER = [family for family in FAMILIES if family.has_class and family.unknown]


@pytest.mark.models
@pytest.mark.parametrize("row", EARLIER, ids=lambda row: row.id)
def test_before_a_row_is_true_its_class_is_refused_by_name(row: Family, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=f"{row.architecture} is not supported: "):
        load_base(row.make(tmp_path))


def test_a_head_of_another_size_than_the_configuration_names_is_refused(tmp_path: Path) -> None:
    folder = named("Ovis 2").make(tmp_path, vocab_size=600)
    with pytest.raises(FailedPrecondition, match=r"`lm_head` should be \(600, 64\) .* \(512, 64\)"):
        load_base(folder)


def test_what_is_not_in_the_table_is_served_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert {family.architecture for family in FAMILIES if family.served} == TESTED
    load_base(named("Llama").make(tmp_path / "llama"))
    assert "not in the table of tested families" not in caplog.text
    layers = ["linear_attention", "full_attention"]
    changes = {"num_hidden_layers": 2, "layers_block_type": layers}
    load_base(named("Nemotron-H").make(tmp_path / "nemotron", **changes))
    assert "NemotronHForCausalLM is not in the table of tested families" in caplog.text


def test_the_page_is_made_from_the_table() -> None:
    printed = Path(__file__).parents[2] / "docs" / "models.md"
    assert printed.read_text() == page()


def test_the_page_says_of_every_renderer_what_it_is_compared_with() -> None:
    named_there = [name for row in COMPARED for name in row.renderers]
    assert sorted(named_there) == sorted(RENDERER_NAMES)
    assert all(row.source or row.reference.startswith("none: ") for row in COMPARED)
