"""Requests about runs: what is taken, and what is refused with which words."""

import contextlib
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from mint_core.errors import BaseModelNotFound, InvalidRequest, Unimplemented
from mint_core.lora.spec import LoraRequest
from mintrpc.v1 import trainer_pb2, types_pb2
from tests.unit.trainer_service.models import MODEL
from trainer_service.calls import Load
from trainer_service.wire import fields, requests


def create(**options: Any) -> requests.CreateRun:
    options = {"request_id": "1", "lora_config": types_pb2.LoraConfig(rank=4)} | options
    return requests.parse_create(trainer_pb2.CreateTrainingRunRequest(**options), MODEL)


def refusal(**options: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        create(**options)
    return caught.value


def lora(**options: Any) -> dict[str, types_pb2.LoraConfig]:
    return {"lora_config": types_pb2.LoraConfig(**{"rank": 4} | options)}


def test_defaults_of_a_lora_config_are_filled_in() -> None:
    assert create().source == LoraRequest(rank=4, alpha=32.0, seed=None)


def test_absent_and_false_switches_differ() -> None:
    source = create(**lora(train_mlp=False, seed=0)).source

    assert source == LoraRequest(rank=4, seed=0, train_mlp=False)


def test_target_modules_stand_instead_of_switches() -> None:
    source = create(**lora(target_modules=["q_proj"], alpha=8, use_rslora=True)).source

    assert source == LoraRequest(rank=4, alpha=8, use_rslora=True, target_modules=("q_proj",))


@pytest.mark.parametrize("rank", [0, -1, 65, 4096])
def test_rank_out_of_range(rank: int) -> None:
    error = refusal(**lora(rank=rank))

    assert error.field == "lora_config.rank"
    assert f"is {rank} but must be 1 to 64" in error.message


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        (lora(alpha=0), "lora_config.alpha", "switch the adapter off"),
        (lora(alpha=-1), "lora_config.alpha", "is -1 but must be finite and at least 0"),
        (lora(alpha=float("nan")), "lora_config.alpha", "is nan"),
        (
            lora(train_attn=False, train_mlp=False, train_unembed=False),
            "lora_config",
            "trains nothing",
        ),
        (
            lora(train_mlp=True, target_modules=["q_proj"]),
            "lora_config.train_mlp",
            "both set",
        ),
        (lora(target_modules=["q", "q"]), "lora_config.target_modules[1]", "twice"),
        (lora(target_modules=[""]), "lora_config.target_modules[0]", "is empty"),
        ({"request_id": ""}, "request_id", "is empty"),
        ({"request_id": "x" * 129}, "request_id", "129 characters"),
        ({"metadata": {"a": "x" * 16384}}, "metadata", "16385 bytes"),
        ({"lora_config": None}, "source", "neither `lora_config` nor `checkpoint`"),
    ],
)
def test_bad_creates(options: dict[str, Any], field: str, words: str) -> None:
    error = refusal(**options)

    assert error.field == field
    assert words in error.message


def test_another_base_model_is_not_found() -> None:
    with pytest.raises(BaseModelNotFound) as caught:
        create(base_model="Qwen/Qwen3-8B")

    assert caught.value.metadata == {"base_model": "Qwen/Qwen3-8B", "served": "tiny"}
    assert create(base_model="tiny").source == create().source


def test_a_run_is_isolated_only_on_request() -> None:
    assert create(isolated=True).isolated
    assert not create().isolated


def test_a_run_may_be_kept_longer_or_shorter_than_others() -> None:
    assert create().retention_s is None
    assert create(retention=Duration(seconds=60)).retention_s == 60
    assert refusal(retention=Duration(seconds=-1)).field == "retention"


def checkpoint(path: str, with_optimizer: bool = False) -> dict[str, Any]:
    source = trainer_pb2.CheckpointSource(path=path, with_optimizer=with_optimizer)
    return {"lora_config": None, "checkpoint": source}


def test_a_run_may_start_from_a_checkpoint() -> None:
    path = "mint://run-1/weights/a@3"

    assert create(**checkpoint(path, True)).source == Load(path=path, with_optimizer=True)


def test_an_adapter_alone_has_no_optimizer() -> None:
    error = refusal(**checkpoint("mint://run-1/sampler_weights/a", True))

    assert error.field == "checkpoint.path"
    assert "no optimizer state" in error.message
    create(**checkpoint("mint://run-1/sampler_weights/a"))


def test_a_path_must_be_one() -> None:
    error = refusal(**checkpoint("run-1/weights/a"))

    assert error.field == "checkpoint.path"
    assert "is not a checkpoint path" in error.message


@pytest.mark.parametrize("page_size", [-1, 1001])
def test_page_size_out_of_range(page_size: int) -> None:
    with pytest.raises(InvalidRequest, match="0 to 1000"):
        requests.parse_list(trainer_pb2.ListTrainingRunsRequest(page_size=page_size))


def test_an_unknown_kind_of_run() -> None:
    request = trainer_pb2.ListTrainingRunsRequest(kind=99)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="`kind` 99 is unknown"):
        requests.parse_list(request)


@pytest.mark.parametrize("ttl", [Duration(), Duration(seconds=-5), Duration(seconds=10**11)])
def test_bad_lifetimes(ttl: Duration) -> None:
    with pytest.raises(InvalidRequest, match="more than 0 and at most 36500 days"):
        fields.ttl_s(trainer_pb2.SaveStateRequest(ttl=ttl))


def test_lifetimes_are_in_seconds() -> None:
    assert fields.ttl_s(trainer_pb2.SaveStateRequest()) is None
    assert fields.ttl_s(trainer_pb2.SaveStateRequest(ttl=Duration(nanos=500_000_000))) == 0.5


def test_the_hash_is_of_the_content_not_of_the_bytes() -> None:
    one = trainer_pb2.CreateTrainingRunRequest(request_id="1", metadata={"a": "1", "b": "2"})
    other = trainer_pb2.CreateTrainingRunRequest.FromString(
        b"".join(
            trainer_pb2.CreateTrainingRunRequest(**part).SerializeToString()
            for part in ({"metadata": {"b": "2"}}, {"metadata": {"a": "1"}}, {"request_id": "1"})
        )
    )

    def digest(request: trainer_pb2.CreateTrainingRunRequest) -> bytes:
        return requests.hash_of(type(request), requests.canonical(request))

    assert digest(one) == digest(other)
    other.metadata["a"] = "2"
    assert digest(one) != digest(other)


CONFIGS = st.builds(
    types_pb2.LoraConfig,
    rank=st.integers(-(2**31), 2**31 - 1),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    train_attn=st.none() | st.booleans(),
    train_mlp=st.none() | st.booleans(),
    train_unembed=st.none() | st.booleans(),
    alpha=st.none() | st.floats(),
    use_rslora=st.booleans(),
    target_modules=st.lists(st.text(max_size=5), max_size=3),
)


@given(
    st.builds(
        trainer_pb2.CreateTrainingRunRequest,
        request_id=st.text(max_size=200),
        base_model=st.sampled_from(["", "tiny", "other"]),
        lora_config=st.none() | CONFIGS,
        metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
        isolated=st.booleans(),
    )
)
def test_no_create_crashes(request: trainer_pb2.CreateTrainingRunRequest) -> None:
    with contextlib.suppress(InvalidRequest, Unimplemented, BaseModelNotFound):
        parsed = requests.parse_create(request, MODEL)
        assert isinstance(parsed.source, LoraRequest)
        assert 1 <= parsed.source.rank <= MODEL.max_lora_rank
