"""What a stranger's request or adapter cannot do: end the engine of everybody."""

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from mint_core.lora.spec import AdapterSpec
from tests.samplers import HEAD, Sampler, connected, refusal, tokens_of
from tests.servers import running_sampler

BELOW = -(2**63) + 1  # float64 has it as -2**63


@pytest.fixture(scope="module")
def sampler(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    store = tmp_path_factory.mktemp("store")
    with (
        running_sampler(qwen3_folder, store, base_model_name="tiny") as service,
        connected(service, store) as sampler,
    ):
        yield sampler


@pytest.fixture
def engine(sampler: Sampler) -> Iterator[psutil.Process]:
    """Which is the same afterwards, and answers."""
    expected = tokens_of(sampler.sample())
    (engine,) = sampler.engines()
    yield engine
    assert tokens_of(sampler.sample()) == expected
    assert engine.is_running()


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": -(2**63), "maximum": -(2**63)},
        {"type": "integer", "minimum": BELOW, "maximum": BELOW},
        {
            "properties": {
                "a": {"allOf": [{"type": "integer", "minimum": BELOW}, {"maximum": BELOW}]}
            }
        },
    ],
)
def test_a_schema_that_ends_its_compiler_is_refused_by_name(
    sampler: Sampler, schema: object
) -> None:
    params = {"json_schema": json.dumps(schema), "ignore_eos": False}
    code, _, info = refusal(lambda: sampler.sample(params=params))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert info.metadata["field"] == "sampling_params.json_schema"


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("alpha", [1e308, 1e40])
def test_an_adapter_whose_scale_is_no_number_is_refused_by_name(
    sampler: Sampler, alpha: float
) -> None:
    spec = AdapterSpec(rank=4, alpha=alpha, use_rslora=False, seed=1, modules=(HEAD,))
    path = sampler.publish(f"r-alpha-{alpha:g}".replace("+", "-"), seed=1, spec=spec)
    for _ in range(2):
        code, message, info = refusal(lambda: sampler.sample(model_path=path))
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert info.metadata["model_path"] == path
        assert "smaller `alpha`" in message
