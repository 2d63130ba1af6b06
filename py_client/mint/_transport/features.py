"""What the contract has got since its baseline: sent only to servers that say that they take it."""

from google.protobuf.message import Message

from mint._transport.connection import Connection
from mint.errors import refused

RESUME_SAMPLES = "resume_stream_sample"
RESUME_WATCHES = "resume_watch"

# Of requests: fields, or values of theirs, that servers of the baseline do not know; the feature or
# the loss that a server lists which does; and what users call it.
FEATURES = {
    "ForwardRequest.gspo": ("gspo", "loss_fn"),
    "ForwardBackwardRequest.gspo": ("gspo", "loss_fn"),
    "ListTrainingRunsRequest.kind": ("list_filters", "kind"),
    "ListTrainingRunsRequest.skip": ("list_filters", "offset"),
    "ListCheckpointsRequest.metadata_filter": ("list_filters", "metadata_filter"),
    "ListCheckpointsRequest.skip": ("list_filters", "offset"),
    "ListCheckpointsRequest.kind=CHECKPOINT_KIND_MERGED": ("list_filters", "checkpoint_type"),
    "ExportCheckpointRequest.ttl": ("export_ttl", "ttl_seconds"),
    "UploadHeader.base_model": ("upload_base_model", "base_model"),
    "SampleRequest.prompt_alt_tokens_k": ("prompt_alt_tokens", "prompt_alt_tokens_k"),
    "SampleRequest.include_routed_experts": ("routed_experts", "include_routed_experts"),
    "StreamSampleRequest.request_id": (RESUME_SAMPLES, "request_id"),
    "StreamSampleRequest.received": (RESUME_SAMPLES, "received"),
    "WatchTrainingRunRequest.resume_after": (RESUME_WATCHES, "resume_after"),
}


def check_offered(connection: Connection, request: Message) -> None:
    """Refuses a request with what the server does not list. Nothing has been sent then."""
    for field, value in request.ListFields():
        name = f"{request.DESCRIPTOR.name}.{field.name}"
        if field.enum_type is not None and name not in FEATURES:
            name += f"={field.enum_type.values_by_number[value].name}"
        feature, user_name = FEATURES.get(name, ("", ""))
        if feature and feature not in connection.offered():
            raise refused(
                user_name,
                f"takes a server that lists {feature!r} in its capabilities, and the one at "
                f"`{connection.address.target}` does not: leave it out, or bring the server to "
                "this client's version",
            )
