"""Requests about checkpoints: no content, however odd, does more than be refused."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from mint_core.errors import InvalidRequest, Unimplemented
from mintrpc.v1 import checkpoint_pb2 as pb2
from tests.unit.trainer_service.models import MODEL
from trainer_service.checkpoints import requests as requests
from trainer_service.checkpoints.requests import EXPORT_TTL, Piece, Upload

SHAPED = replace(MODEL, linear_shapes=((100, 32),))
PATHS = st.sampled_from(["mint://run-1/weights/a", "mint://run-1/merged_weights/a@2", "x", ""])
IDS = st.text(max_size=3) | st.just("x" * 200)
NAMES = st.sampled_from(["a", "../a", ""])
TTLS = st.none() | st.builds(Duration, seconds=st.integers(-5, 2**40), nanos=st.integers(-5, 5))
FILES = st.builds(
    pb2.CheckpointFile,
    name=st.sampled_from(["adapter_config.json", "adapter_model.safetensors", "x.bin"]),
    size_bytes=st.integers(-1, 2**50),
    sha256=st.sampled_from(["0" * 64, "F" * 64, ""]),
)
HEADERS = st.builds(
    pb2.UploadHeader,
    request_id=IDS,
    name=NAMES,
    files=st.lists(FILES, max_size=3),
    metadata=st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2),
    ttl=TTLS,
)


async def read(*parts: pb2.UploadCheckpointRequest) -> tuple[Upload, Sequence[Piece]]:
    async def arriving() -> AsyncIterator[pb2.UploadCheckpointRequest]:
        for part in parts:
            yield part

    upload, pieces = await requests.parse_upload(arriving(), SHAPED)
    return upload, [piece async for piece in pieces]


@given(
    st.builds(pb2.UpdateCheckpointRequest, path=PATHS, request_id=IDS, ttl=TTLS)
    | st.builds(pb2.UpdateCheckpointRequest, path=PATHS, request_id=IDS, keep=st.booleans())
)
def test_no_update_crashes(request: pb2.UpdateCheckpointRequest) -> None:
    with contextlib.suppress(InvalidRequest):
        requests.parse_update(request)


@given(
    st.builds(pb2.CopyCheckpointRequest, path=PATHS, request_id=IDS, name=NAMES, ttl=TTLS),
    st.builds(
        pb2.ExportCheckpointRequest,
        path=PATHS,
        request_id=IDS,
        dtype=st.integers(-1, 9),
        ttl=TTLS,
    ),
    st.builds(
        pb2.DownloadCheckpointRequest,
        path=PATHS,
        file_name=st.text(max_size=3),
        offset_bytes=st.integers(-(2**63), 2**63 - 1),
    ),
)
def test_no_copy_export_or_download_crashes(
    copy: pb2.CopyCheckpointRequest,
    export: pb2.ExportCheckpointRequest,
    download: pb2.DownloadCheckpointRequest,
) -> None:
    with contextlib.suppress(InvalidRequest):
        requests.parse_copy(copy)
    with contextlib.suppress(InvalidRequest, Unimplemented):
        requests.parse_export(export)
    with contextlib.suppress(InvalidRequest):
        requests.parse_download(download)


@given(header=HEADERS)
async def test_no_header_crashes(header: pb2.UploadHeader) -> None:
    with contextlib.suppress(InvalidRequest):
        await read(pb2.UploadCheckpointRequest(header=header))


async def test_an_upload_is_its_header_and_its_pieces() -> None:
    files = [
        pb2.CheckpointFile(name=name, size_bytes=9, sha256="0" * 64)
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    header = pb2.UploadHeader(request_id="i", name="a", files=files, metadata={"k": "v"})
    piece = pb2.UploadPiece(file_name="adapter_config.json", offset_bytes=3, data=b"x")

    upload, pieces = await read(
        pb2.UploadCheckpointRequest(header=header), pb2.UploadCheckpointRequest(piece=piece)
    )

    assert (upload.name, upload.metadata, upload.expire_time) == ("a", {"k": "v"}, None)
    assert {name: entry.size_bytes for name, entry in upload.files.items()} == {
        "adapter_config.json": 9,
        "adapter_model.safetensors": 9,
    }
    assert pieces == [("adapter_config.json", 3, b"x")]


async def test_nothing_at_all_is_no_upload() -> None:
    with pytest.raises(InvalidRequest, match="has no `header`"):
        await read()


def test_an_export_is_kept_for_a_day_unless_asked() -> None:
    request = pb2.ExportCheckpointRequest(path="mint://run-1/weights/a", request_id="i")
    now = datetime.now(UTC)
    assert requests.parse_export(request).expire_time >= now + EXPORT_TTL
    request.ttl.FromSeconds(60)
    assert requests.parse_export(request).expire_time < now + timedelta(hours=1)


def test_an_update_changes_what_it_names() -> None:
    def parsed(**fields: object) -> requests.UpdateCheckpoint:
        path = "mint://run-1/weights/a"
        request = pb2.UpdateCheckpointRequest(path=path, request_id="i", **fields)  # type: ignore[arg-type]
        return requests.parse_update(request)

    kept = parsed(keep=True)
    assert (kept.changes_lifetime, kept.expire_time, kept.metadata) == (True, None, None)
    timed = parsed(ttl=Duration(seconds=60), metadata=pb2.CheckpointMetadata())
    assert (timed.changes_lifetime, timed.metadata) == (True, {})
    assert timed.expire_time is not None
    described = parsed(metadata=pb2.CheckpointMetadata(entries={"a": "b"}))
    assert (described.changes_lifetime, described.metadata) == (False, {"a": "b"})
