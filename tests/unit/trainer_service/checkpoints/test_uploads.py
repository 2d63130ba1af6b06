"""Uploads of callers who send nothing, too much, or leave."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint_store import CheckpointStore, FileEntry
from checkpoint_store.errors import StoreQuotaExceeded
from mint_core.errors import InvalidRequest, Unavailable
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.quotas import QuotaBook
from tests.unit.trainer_service.models import MODEL
from trainer_service.checkpoints import requests
from trainer_service.checkpoints.checkpoints import Checkpoints
from trainer_service.checkpoints.requests import Piece, Upload
from trainer_service.checkpoints.uploads import Uploads
from trainer_service.wire.idempotency import remembered_ids
from trainer_service.wire.requests import Identity

LIMIT_S = 30.0
NAME = "adapter_config.json"
UPLOAD = Upload(
    identity=Identity("id", b"hash"),
    name="a",
    files={NAME: FileEntry(1000, "0" * 64)},
    metadata={},
    expire_time=None,
    base_model="",
)


async def silent() -> AsyncIterator[Any]:
    await asyncio.get_running_loop().create_future()
    yield


async def sent(*pieces: Piece) -> AsyncIterator[Piece]:
    for piece in pieces:
        yield piece


def uploads(root: Path, quota_bytes: int = 0) -> Uploads:
    async def no_engine(job: object) -> None:
        raise AssertionError

    store = CheckpointStore(root, quota_bytes=quota_bytes)
    ids = remembered_ids(QuotaBook(None, Metrics()))
    return Uploads(Checkpoints(store, None, no_engine), ids)


def staged(root: Path) -> list[Path]:
    return list((root / ".staging").iterdir()) if (root / ".staging").exists() else []


async def test_a_header_that_does_not_come_is_waited_for_as_a_piece_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(requests, "SILENCE_LIMIT_S", 0.01)
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(Unavailable, match="no header of the upload has come for 0 s"):
            await requests.parse_upload(silent(), MODEL)
        with pytest.raises(Unavailable, match="no piece of the upload has come for 0 s"):
            await uploads(tmp_path).receive("t", UPLOAD, silent(), MODEL)
    assert not staged(tmp_path)


async def test_an_empty_piece_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="is empty") as caught:
        await uploads(tmp_path).receive("t", UPLOAD, sent((NAME, 0, b"")), MODEL)
    assert caught.value.field == "piece.data"
    assert not staged(tmp_path)


async def test_what_an_upload_takes_ends_with_its_caller(tmp_path: Path) -> None:
    call = asyncio.create_task(uploads(tmp_path).receive("t", UPLOAD, silent(), MODEL))
    async with asyncio.timeout(LIMIT_S):
        while not staged(tmp_path):
            await asyncio.sleep(0.001)
        call.cancel()
        await asyncio.wait([call])
    assert call.cancelled()
    assert not staged(tmp_path)


async def test_an_upload_for_which_there_is_no_room_is_refused_at_its_header(
    tmp_path: Path,
) -> None:
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(StoreQuotaExceeded) as caught:
            await uploads(tmp_path, 999).receive("t", UPLOAD, silent(), MODEL)
    assert caught.value.metadata["size_bytes"] == "1000"
