"""What the baseline of the contract lacks is sent to servers that list it, and to no others."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

import mint
from mint import types
from mint._transport.features import FEATURES, check_offered
from mintrpc.v1 import checkpoint_pb2
from tests import baseline
from tests.unit.mint.faulty_server import Server

# The client has no words for these: it sends tokens and bytes.
NEVER_SENT = {"TensorData.float_values", "TensorData.int_values", "ModelInputChunk.text"}
NEVER_SENT |= {"SampleRequest.include_text"}
# Samplers send these.
NEVER_SENT |= {"GetCheckpointRequest.for_tenant", "DownloadCheckpointRequest.for_tenant"}
# These lie within parts of a request, which are not looked through: older servers refuse them as
# fields that they do not know.
WITHIN = {"Datum.routed_experts", "LoraConfig.train_experts"}
# Fields of messages that the baseline lacks are sent with the field that holds the message.
PARTS = {"TextChunk", "TokenSequence", "Gspo", "MetadataFilterEntry"}
# Whole calls: `get_tokenizer(on_server=True)` asks whether the server lists "texts".
PARTS |= {"TokenizeRequest", "DetokenizeRequest", "RenderChatRequest", "Chat", "ChatMessage"}
PROMPT = types.ModelInput.from_ints([1, 2])


def requests() -> Iterator[Any]:
    """The messages that the client sends."""
    used = baseline.client_calls()
    for name in ("model", "trainer", "sampler", "checkpoint"):
        module = importlib.import_module(f"mintrpc.v1.{name}_pb2")
        for service in module.DESCRIPTOR.services_by_name.values():
            yield from (call.input_type for call in service.methods if call.name in used)


def names_of(field: FieldDescriptor) -> Iterator[str]:
    """What of a field the baseline lacks."""
    assert field.containing_type is not None
    name = f"{field.containing_type.name}.{field.name}"
    if not baseline.has(field):
        yield name
    elif field.enum_type is not None:
        yield from (f"{name}={value}" for value in baseline.new_values(field))


def test_every_part_of_a_request_that_the_baseline_lacks_has_a_feature() -> None:
    fields = {field.full_name: field for kind in requests() for field in baseline.fields_of(kind)}
    lacking = {name for field in fields.values() for name in names_of(field)}
    lacking = {name for name in lacking if name.partition(".")[0] not in PARTS}
    assert lacking - NEVER_SENT - WITHIN == set(FEATURES)


@pytest.mark.parametrize("name", FEATURES)
def test_it_is_sent_to_servers_that_list_it_and_refused_for_others(
    server: Server, name: str
) -> None:
    kinds = {kind.name: kind for kind in (*requests(), checkpoint_pb2.UploadHeader.DESCRIPTOR)}
    (message, _, field), value = name.partition("=")[0].partition("."), name.partition("=")[2]
    request = GetMessageClass(kinds[message])(**{field: example(kinds[message], field, value)})
    feature, user_name = FEATURES[name]
    for listed in (True, False):
        server.model.features = ["another", *([feature] if listed else [])]
        with mint.ServiceClient(base_url=server.address) as service:
            trainer = service._servers.trainer
            if listed or feature == "gspo":  # a loss, which that server always lists
                check_offered(trainer, request)
                continue
            with pytest.raises(mint.InvalidInputError, match=f"lists '{feature}'") as caught:
                check_offered(trainer, request)
            assert caught.value.field == user_name


def example(kind: Any, name: str, value: str) -> Any:
    """Something that the field holds."""
    field = kind.fields_by_name[name]
    if field.message_type is not None:
        if field.message_type.GetOptions().map_entry:
            return {"a": "b"}
        return [{}] if field.is_repeated else {}
    return value or (1 if field.type != FieldDescriptor.TYPE_STRING else "a")


Use = Callable[[mint.ServiceClient], Any]
USES: dict[str, Use] = {
    "offset": lambda service: service.create_rest_client().list_training_runs(offset=1).result(),
    "kind": lambda service: service.list_training_runs(kind="trained"),
    "metadata_filter": lambda service: (
        service.create_rest_client().list_user_checkpoints(metadata_filter={"a": "b"}).result()
    ),
    "checkpoint_type": lambda service: (
        service.create_rest_client().list_user_checkpoints(checkpoint_type="merged").result()
    ),
    "ttl_seconds": lambda service: (
        service.create_rest_client().export_checkpoint("mint://a", ttl_seconds=5).result()
    ),
    "prompt_alt_tokens_k": lambda service: (
        service.create_sampling_client().sample(PROMPT, prompt_alt_tokens_k=1).result()
    ),
}


@pytest.mark.parametrize("option", USES)
def test_an_option_is_refused_by_the_name_that_its_user_gave(server: Server, option: str) -> None:
    server.model.features = []
    with (
        mint.ServiceClient(base_url=server.address) as service,
        pytest.raises(mint.InvalidInputError) as caught,
    ):
        USES[option](service)
    assert caught.value.field == option
    assert str(caught.value).startswith(f"`{option}` takes a server")
