"""How much a request may hold: the most elements, bytes and magnitude of each field. One table.

The contract's comments and `Limits` say the same; `mint_core.rpc.parsing` refuses what goes beyond,
before anything is made of it. Not here: what depends on the model, or on other fields.
"""

from dataclasses import dataclass

from google.protobuf.descriptor import FieldDescriptor

from mint_core.rpc import limits

FLOAT32_LEAST = 1.1754943508222875e-38  # the smallest that is not denormal

# Of all that a request holds: each field that is set, and each element that is not packed.
MAX_VALUES = 1_000_000


@dataclass(frozen=True, slots=True)
class Bound:
    """Of one field, in each message that has it."""

    most: int = 1  # elements
    most_bytes: int | None = None  # of a text; None: limits.MAX_TEXT_BYTES
    least: float = 0.0  # of a number other than 0, and of 0 if `positive`
    positive: bool = False
    remedy: str = "shorten it"


_SINGLE = Bound()
_METADATA = Bound(limits.MAX_METADATA_ENTRIES, remedy="leave some out")
_DATA = Bound(limits.MAX_DATA_PER_REQUEST, remedy="split the batch")
_CONSTRAINT = Bound(most_bytes=limits.MAX_CONSTRAINT_BYTES)
_NUMBERS = Bound(limits.MAX_TYPED_VALUES, remedy="give them as bytes, in `values`")
_METADATA_TEXT = Bound(most_bytes=limits.MAX_METADATA_BYTES)

# Of the fields that hold more than one text of MAX_TEXT_BYTES or one number of float32.
_TABLE: dict[str, Bound] = {
    "TensorData.shape": Bound(limits.MAX_TENSOR_DIMENSIONS),
    "TensorData.float_values": _NUMBERS,
    "TensorData.int_values": _NUMBERS,
    "ModelInput.chunks": Bound(limits.MAX_CHUNKS_PER_INPUT, remedy="join chunks of text"),
    "EncodedTextChunk.tokens": Bound(limits.MAX_TOKENS_PER_CHUNK),
    "Datum.loss_fn_inputs": Bound(limits.MAX_LOSS_FN_INPUTS),
    "LoraConfig.target_modules": Bound(
        limits.MAX_TARGET_MODULES, remedy="name the ends of names, which match many modules"
    ),
    "AdamParams.eps": Bound(least=FLOAT32_LEAST, positive=True),
    "ForwardRequest.data": _DATA,
    "ForwardBackwardRequest.data": _DATA,
    "SamplingParams.stop": Bound(limits.MAX_STOP_TEXTS, remedy="leave some out"),
    "SamplingParams.stop_token_ids": Bound(limits.MAX_STOP_TOKEN_IDS, remedy="leave some out"),
    "SamplingParams.regex": _CONSTRAINT,
    "SamplingParams.json_schema": _CONSTRAINT,
    "CreateTrainingRunRequest.metadata": _METADATA,
    "UpdateTrainingRunRequest.metadata": _METADATA,
    "ListTrainingRunsRequest.metadata_filter": _METADATA,
    "SaveStateRequest.metadata": _METADATA,
    "SaveWeightsForSamplerRequest.metadata": _METADATA,
    "ListCheckpointsRequest.metadata_filter": _METADATA,
    "CheckpointMetadata.entries": _METADATA,
    "UploadHeader.metadata": _METADATA,
    "TextChunk.text": Bound(most_bytes=limits.MAX_TEXT_REQUEST_BYTES),
    "TokenizeRequest.texts": Bound(
        limits.MAX_TEXTS, limits.MAX_TEXT_REQUEST_BYTES, remedy="split the request"
    ),
    "StreamSampleRequest.received": Bound(limits.MAX_SAMPLES_PER_REQUEST, remedy="leave some out"),
    "TokenSequence.tokens": Bound(limits.MAX_TOKENS_PER_CHUNK),
    "DetokenizeRequest.sequences": Bound(limits.MAX_TEXTS, remedy="split the request"),
    "RenderChatRequest.chats": Bound(limits.MAX_TEXTS, remedy="split the request"),
    "RenderChatRequest.tools_json": Bound(most_bytes=limits.MAX_TOOLS_BYTES),
    "Chat.messages": Bound(limits.MAX_TEXTS, remedy="leave some out"),
    "ChatMessage.content": Bound(most_bytes=limits.MAX_TEXT_REQUEST_BYTES),
    "CreateKeyRequest.scopes": Bound(limits.MAX_SCOPES, remedy="leave some out"),
    "UploadHeader.files": Bound(limits.MAX_UPLOADED_FILES, remedy="leave some out"),
    "MetadataEntry.key": _METADATA_TEXT,
    "MetadataEntry.value": _METADATA_TEXT,
    "MetadataFilterEntry.key": _METADATA_TEXT,
    "MetadataFilterEntry.value": _METADATA_TEXT,
    "EntriesEntry.key": _METADATA_TEXT,
    "EntriesEntry.value": _METADATA_TEXT,
}


def bound_of(field: FieldDescriptor) -> Bound:
    """What holds for a field. KeyError if it may repeat and the table does not know it."""
    assert field.containing_type is not None
    name = f"{field.containing_type.name}.{field.name}"
    return _TABLE[name] if field.is_repeated else _TABLE.get(name, _SINGLE)
