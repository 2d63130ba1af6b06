"""Every field of a request has a bound; the contract says it; it holds before anything is made."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given

from mint_core.errors import InvalidRequest
from mint_core.lora.spec import LARGEST_FLOAT32 as FLOAT32_MAX
from mint_core.rpc import bounds
from mint_core.rpc.bounds import FLOAT32_LEAST, bound_of
from mint_core.rpc.parsing import NotTaken, parse
from mintrpc.v1 import checkpoint_pb2, sampler_pb2, trainer_pb2, types_pb2

PROTO = Path(__file__).parents[3] / "proto" / "mintrpc" / "v1"
SERVICES = ("model", "trainer", "sampler", "checkpoint", "admin")
Sample = sampler_pb2.SampleRequest
Compute = trainer_pb2.ForwardBackwardRequest
Create = trainer_pb2.CreateTrainingRunRequest
Step = trainer_pb2.OptimStepRequest


def kinds(kind: Descriptor) -> Iterator[Descriptor]:
    yield kind
    for field in kind.fields:
        if field.message_type is not None:
            yield from kinds(field.message_type)


def request_fields() -> list[FieldDescriptor]:
    """Of all requests of all services, with what is in them."""
    found: dict[str, FieldDescriptor] = {}
    for name in SERVICES:
        module = importlib.import_module(f"mintrpc.v1.{name}_pb2")
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                for kind in kinds(method.input_type):
                    found |= {field.full_name: field for field in kind.fields}
    return list(found.values())


def test_every_field_that_repeats_has_a_bound_and_no_other_name_is_in_the_table() -> None:
    fields = request_fields()
    for field in fields:
        bound_of(field)
    names = {f"{field.containing_type.name}.{field.name}" for field in fields}
    assert set(bounds._TABLE) <= names


@pytest.mark.parametrize(
    "field",
    [f for f in request_fields() if f.is_repeated and f.containing_type.file.package != ""],
    ids=lambda f: f.full_name,
)
def test_the_contract_says_how_many_are_taken(field: FieldDescriptor) -> None:
    text = (PROTO / Path(field.file.name).name).read_text()
    body = text[text.index(f"message {field.containing_type.name} {{") :]
    comment = body[: body.index(f" {field.name} = ")].rpartition(";\n")[2]
    told = {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", comment)}
    assert bound_of(field).most in told or "max_data_per_request" in comment


def ints(*values: int) -> types_pb2.ModelInput:
    return types_pb2.ModelInput(chunks=[{"encoded_text": {"tokens": values}}])


# What is at a bound, and the same with one more.
EDGES: dict[str, tuple[Message, Message, str]] = {
    "data": (Compute(data=[{}] * 1024), Compute(data=[{}] * 1025), "data"),
    "chunks": (
        Sample(prompt={"chunks": [{}] * 8192}),
        Sample(prompt={"chunks": [{}] * 8193}),
        "prompt.chunks",
    ),
    "tokens": (
        Sample(prompt=ints(*[300] * 2**20)),
        Sample(prompt=ints(*[300] * (2**20 + 1))),
        "prompt.chunks[0].encoded_text.tokens",
    ),
    "dimensions": (
        Sample(target_prompt_logprobs={"shape": [2**63 - 1] * 2}),
        Sample(target_prompt_logprobs={"shape": [1] * 150_000}),
        "target_prompt_logprobs.shape",
    ),
    "numbers": (
        Sample(target_prompt_logprobs={"int_values": [300] * 2**20}),
        Sample(target_prompt_logprobs={"int_values": [300] * (2**20 + 1)}),
        "target_prompt_logprobs.int_values",
    ),
    "floats": (
        Sample(target_prompt_logprobs={"float_values": [0.5] * 2**20}),
        Sample(target_prompt_logprobs={"float_values": [0.5] * (2**20 + 1)}),
        "target_prompt_logprobs.float_values",
    ),
    "inputs": (
        Compute(data=[{"loss_fn_inputs": {str(i): {} for i in range(16)}}]),
        Compute(data=[{}, {"loss_fn_inputs": {str(i): {} for i in range(17)}}]),
        "data[1].loss_fn_inputs",
    ),
    "modules": (
        Create(lora_config={"target_modules": ["a"] * 4096}),
        Create(lora_config={"target_modules": ["a"] * 4097}),
        "lora_config.target_modules",
    ),
    "stops": (
        Sample(sampling_params={"stop": ["a"] * 256}),
        Sample(sampling_params={"stop": ["a"] * 257}),
        "sampling_params.stop",
    ),
    "stop ids": (
        Sample(sampling_params={"stop_token_ids": [7] * 16384}),
        Sample(sampling_params={"stop_token_ids": [7] * 16385}),
        "sampling_params.stop_token_ids",
    ),
    "text": (Sample(model_path="é" * 512), Sample(model_path="é" * 512 + "a"), "model_path"),
    "schema": (
        Sample(sampling_params={"json_schema": "a" * 2**16}),
        Sample(sampling_params={"json_schema": "a" * (2**16 + 1)}),
        "sampling_params.json_schema",
    ),
    "metadata": (
        Create(metadata={str(i): "" for i in range(64)}),
        Create(metadata={str(i): "" for i in range(65)}),
        "metadata",
    ),
    "metadata text": (
        Create(metadata={"k": "v" * 2**14}),
        Create(metadata={"k": "v" * (2**14 + 1)}),
        "metadata.k",
    ),
    "files": (
        checkpoint_pb2.UploadCheckpointRequest(header={"files": [{}] * 16}),
        checkpoint_pb2.UploadCheckpointRequest(header={"files": [{}] * 17}),
        "header.files",
    ),
    "threshold": (
        Compute(ppo={"clip_high_threshold": FLOAT32_MAX}),
        Compute(ppo={"clip_high_threshold": 1e39}),
        "ppo.clip_high_threshold",
    ),
    "alpha": (
        Create(lora_config={"alpha": FLOAT32_MAX}),
        Create(lora_config={"alpha": -1e308}),
        "lora_config.alpha",
    ),
    "eps": (
        Step(adam_params={"eps": FLOAT32_LEAST}),
        Step(adam_params={"eps": 0.0}),
        "adam_params.eps",
    ),
    "small eps": (
        Step(adam_params={"eps": 1e-8}),
        Step(adam_params={"eps": 1e-50}),
        "adam_params.eps",
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_what_is_at_a_bound_is_taken_and_one_more_is_not(name: str) -> None:
    taken, refused, field = EDGES[name]
    raw = taken.SerializeToString()
    assert parse(type(taken).FromString, raw).SerializeToString(deterministic=True) == (
        taken.SerializeToString(deterministic=True)
    )
    with pytest.raises(InvalidRequest) as caught:
        parse(type(refused).FromString, refused.SerializeToString())
    assert caught.value.field == field
    assert f"`{field}`" in caught.value.message


@pytest.mark.parametrize("value", [1e39, -sys.float_info.max])
def test_no_number_is_beyond_float32(value: float) -> None:
    """Of any request: what the engine computes with is float32."""
    doubles = {f for f in request_fields() if f.type == FieldDescriptor.TYPE_DOUBLE}
    assert len(doubles) > 10
    for field in doubles:
        kind = GetMessageClass(field.containing_type)
        raw = kind(**{field.name: value}).SerializeToString()
        with pytest.raises(NotTaken, match=f"`{field.name}` is .* must be within 3.40282e"):
            parse(kind.FromString, raw)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_what_is_no_number_is_left_to_those_who_know_the_field(value: float) -> None:
    request = Compute(ppo={"clip_high_threshold": value})
    parse(Compute.FromString, request.SerializeToString())


def test_what_was_read_before_the_fault_is_kept() -> None:
    """So that a refusal can be recorded as the outcome of its number, at no cost."""
    request = Compute(training_run_id="r", sequence=7, writer_epoch=2, data=[{}] * 3000)
    with pytest.raises(NotTaken) as caught:
        parse(Compute.FromString, request.SerializeToString())
    kept = Compute(training_run_id="r", sequence=7, writer_epoch=2)
    assert caught.value.request == kept


def test_bytes_behind_the_first_fault_are_not_looked_at() -> None:
    raw = Compute(training_run_id="r").SerializeToString() + b"\x2a\x00" * 5_000_000 + b"\xff"
    with pytest.raises(NotTaken, match="`data` has more than 1024 entries; split the batch"):
        parse(Compute.FromString, raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x10\x01\x10\x01",  # a number
        b"\x0a\x00\x0a\x00",  # a text
        b"\x62\x00\x62\x00",  # a message, which protobuf would merge
    ],
)
def test_what_may_not_repeat_is_given_once(raw: bytes) -> None:
    with pytest.raises(NotTaken, match="is given twice"):
        parse(Compute.FromString, raw)


def test_a_request_holds_so_many_values() -> None:
    chunk = {"encoded_text": {"tokens": [1]}}
    datum = {"model_input": {"chunks": [chunk] * 400}}
    request = Compute(data=[datum] * 1024)
    with pytest.raises(NotTaken, match=r"more than 1000000 values, the last of them in `data\["):
        parse(Compute.FromString, request.SerializeToString())


def test_unpacked_numbers_count_as_packed_ones_do() -> None:
    raw = b"\x08\x01" * (2**20 + 1)
    with pytest.raises(NotTaken, match="`tokens` has more than 1048576 entries"):
        parse(types_pb2.EncodedTextChunk.FromString, raw)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=30), st.integers(0, 30))
def test_packed_numbers_are_counted(tokens: list[int], most: int) -> None:
    """Whatever their lengths are: beyond the bound or not, as Python counts."""
    from mint_core.rpc import parsing

    packed = types_pb2.EncodedTextChunk(tokens=tokens).SerializeToString()
    start = len(packed) - len(packed[2:]) if packed else 0
    assert parsing._elements(packed, start, len(packed), parsing._VARINT) == len(tokens)
