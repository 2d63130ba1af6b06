"""Adapters over the contract: fetched from the store, checked, in one batch, in turn."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from mint_core.lora.groups import LinearShape
from mint_core.lora.spec import AdapterSpec
from mint_core.lora.targets import initial_arrays
from tests.engines_in_process import random_arrays
from tests.keys import make_key
from tests.samplers import (
    DEADLINE_S,
    HEAD,
    HIDDEN,
    VOCABULARY,
    Sampler,
    connected,
    refusal,
    sample_request,
    tokens_of,
)
from tests.servers import running_sampler


@pytest.fixture(scope="module")
def samplers(
    qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Sampler, Sampler]]:
    """One with two places for adapters, as two tenants see it."""
    store = tmp_path_factory.mktemp("store")
    keys = {tenant: make_key(tenant, store / "keys") for tenant in ("default", "bob")}
    flags = {"base_model_name": "tiny", "max_adapters": 2, "keys": store / "keys"}
    with (
        running_sampler(qwen3_folder, store, **flags) as service,
        connected(service, store, keys["default"]) as ours,
        connected(service, store, keys["bob"]) as theirs,
    ):
        yield ours, theirs


@pytest.fixture
def sampler(samplers: tuple[Sampler, Sampler]) -> Sampler:
    return samplers[0]


def start(sampler: Sampler, path: str) -> grpc.Future:
    return sampler.stub.Sample.future(
        sample_request(model_path=path), timeout=DEADLINE_S, metadata=sampler.metadata
    )


def test_adapters_in_one_batch_each_give_their_own(sampler: Sampler) -> None:
    paths = ["", sampler.publish("r-one", seed=1), sampler.publish("r-two", seed=2)]
    alone = [sampler.sample(model_path=path) for path in paths]
    assert len({str(tokens_of(response)) for response in alone}) == 3
    calls = [start(sampler, path) for path in paths * 4]
    for i, call in enumerate(calls):
        expected = alone[i % 3]
        assert call.result().sequences == expected.sequences
        assert call.result().sequences[0].revision_path == paths[i % 3]


def test_more_adapters_than_places_take_turns(sampler: Sampler) -> None:
    paths = [sampler.publish(f"r-turn-{i}", seed=i) for i in range(5)]  # and two places
    first = [tokens_of(sampler.sample(model_path=path)) for path in paths]
    calls = [start(sampler, path) for path in paths * 3]
    assert [tokens_of(call.result()) for call in calls] == first * 3


def test_adapters_that_do_not_fit_in_memory_together_take_turns(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    flags = {"base_model_name": "tiny", "adapter_memory_mib": 1, "max_lora_rank": 64}
    with (
        running_sampler(qwen3_folder, tmp_path, **flags) as service,
        connected(service, tmp_path) as sampler,
    ):
        spec = AdapterSpec(rank=64, alpha=32, use_rslora=False, seed=0, modules=(HEAD,))
        arrays = initial_arrays(spec, {HEAD: LinearShape(HIDDEN, VOCABULARY)})
        paths = [  # of which memory holds 99 ranks
            sampler.publish(f"r-{seed}", seed=seed, spec=spec, weights=random_arrays(arrays, seed))
            for seed in range(3)
        ]
        paths += [sampler.publish(f"r-small-{seed}", seed=seed) for seed in range(3)]
        first = [tokens_of(sampler.sample(model_path=path)) for path in paths]
        assert len(set(map(str, first))) > 3
        calls = [start(sampler, path) for path in paths * 3]
        assert [tokens_of(call.result()) for call in calls] == first * 3
        log = service.log_text()
    assert log.count("adapter loaded path=mint://r-") - log.count("adapter dropped") <= 4


def test_a_name_means_its_newest_revision_and_a_revision_stays(sampler: Sampler) -> None:
    old = sampler.publish("r-name", seed=1)
    before = sampler.sample(model_path="mint://r-name/sampler_weights/a")
    new = sampler.publish("r-name", seed=2)
    after = sampler.sample(model_path="mint://r-name/sampler_weights/a")
    assert before.sequences[0].revision_path == old
    assert after.sequences[0].revision_path == new
    assert tokens_of(before) != tokens_of(after)
    assert sampler.sample(model_path=old).sequences == before.sequences


def test_a_path_that_appears_while_it_is_asked_for_is_found(sampler: Sampler) -> None:
    path = "mint://r-late/sampler_weights/a"
    call = start(sampler, path)
    published = sampler.publish("r-late", seed=1)
    assert call.result().sequences[0].revision_path == published


def test_an_unknown_path_is_not_found(sampler: Sampler) -> None:
    path = "mint://r-none/sampler_weights/a"
    code, message, info = refusal(lambda: sampler.sample(model_path=path))
    assert code == grpc.StatusCode.NOT_FOUND
    assert path in message
    assert info.reason == "CHECKPOINT_NOT_FOUND"


def test_a_path_of_the_wrong_kind_is_refused(sampler: Sampler) -> None:
    code, message, _ = refusal(lambda: sampler.sample(model_path="mint://r-one/weights/a"))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "`model_path`" in message
    assert "sampler_weights" in message


def test_an_adapter_of_another_base_is_refused(sampler: Sampler) -> None:
    path = sampler.publish("r-other", seed=1, base_fingerprint="0" * 64, base_model="huge")
    code, message, info = refusal(lambda: sampler.sample(model_path=path))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "'huge'" in message
    assert info.reason == "WRONG_BASE_MODEL"
    assert tokens_of(sampler.sample())  # nobody else noticed


def test_an_adapter_that_does_not_fit_is_refused(sampler: Sampler) -> None:
    spec = AdapterSpec(rank=2, alpha=1, use_rslora=False, seed=0, modules=("no.such.layer",))
    arrays = initial_arrays(spec, {"no.such.layer": LinearShape(8, 8)})
    path = sampler.publish("r-odd", seed=1, spec=spec, weights=arrays)
    code, message, _ = refusal(lambda: sampler.sample(model_path=path))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "no.such.layer" in message


def test_tenants_see_their_own_adapters_alone(samplers: tuple[Sampler, Sampler]) -> None:
    ours, theirs = samplers
    path = ours.publish("r-ours", seed=1)
    assert tokens_of(ours.sample(model_path=path))
    code, _, info = refusal(lambda: theirs.sample(model_path=path))  # though it is loaded
    assert code == grpc.StatusCode.NOT_FOUND
    assert info.reason == "CHECKPOINT_NOT_FOUND"
    code, _, _ = refusal(lambda: ours.stub.Sample(sample_request(), timeout=DEADLINE_S))
    assert code == grpc.StatusCode.UNAUTHENTICATED
