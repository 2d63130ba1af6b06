"""Checkpoints on their way to callers, file by file and piece by piece."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from pathlib import Path

from checkpoint_store import CheckpointDamaged, CheckpointStore, FileEntry, OpenCheckpoint
from checkpoint_store.store_files import open_file, problem_of
from mint_core.errors import CheckpointNotFound, InvalidRequest, NotFound, Unavailable
from trainer_service.checkpoints.requests import Download

PIECE_BYTES = 1024 * 1024
_STORED_LIMIT_S = 60.0  # for a snapshot that is still being written to the store
_STORED_INTERVAL_S = 0.1


FilePiece = tuple[str, FileEntry, int, bytes]  # of the whole file; where the bytes begin in it


class FileNotThere(NotFound):
    """The checkpoint has no such file."""

    reason = "CHECKPOINT_FILE_NOT_FOUND"

    def __init__(self, path: str, name: str, files: Mapping[str, FileEntry]) -> None:
        super().__init__(
            f"checkpoint `{path}` has no file `{name}`; it has {', '.join(sorted(files))}",
            path=path,
            file=name,
        )


async def pieces(
    store: CheckpointStore, tenant: str, wanted: Download
) -> AsyncGenerator[FilePiece, None]:
    """The files in pieces. Their reader checks them as wholes: SHA-256 is not computed here."""
    found, run = await stored(store, tenant, wanted.path), partial(store.in_turn, tenant)
    await run(found.note_use)
    if found.copied:
        await run(store.verify, found)  # which brings the copies
    path = str(found.manifest.revision_path)
    for name, entry in _chosen(path, found.manifest.files, wanted).items():
        offset = wanted.offset_bytes
        while True:
            data = await run(_read, path, found.folder / name, entry, offset)
            yield name, entry, offset, data
            offset += len(data)
            if offset >= entry.size_bytes:
                break


async def stored(store: CheckpointStore, tenant: str, path: str) -> OpenCheckpoint:
    """The checkpoint's files, unverified; a snapshot that is in memory is waited for."""
    ends_s = time.monotonic() + _STORED_LIMIT_S
    while True:
        try:
            return await store.in_turn(tenant, store.find_stored, path, tenant=tenant)
        except CheckpointNotFound:
            await store.in_turn(tenant, store.find, path, tenant=tenant)  # or is it nowhere?
        if time.monotonic() > ends_s:
            raise Unavailable(
                f"snapshot `{path}` is in memory and not stored yet; send the call again"
            )
        await asyncio.sleep(_STORED_INTERVAL_S)


def _chosen(path: str, files: Mapping[str, FileEntry], wanted: Download) -> Mapping[str, FileEntry]:
    if not wanted.file_name:
        return files
    if wanted.file_name not in files:
        raise FileNotThere(path, wanted.file_name, files)
    entry = files[wanted.file_name]
    if wanted.offset_bytes > entry.size_bytes:
        raise InvalidRequest(
            f"`offset_bytes` is {wanted.offset_bytes} but `{wanted.file_name}` has "
            f"{entry.size_bytes} bytes; start again at 0",
            field="offset_bytes",
            size_bytes=entry.size_bytes,
        )
    return {wanted.file_name: entry}


def _read(path: str, file: Path, entry: FileEntry, offset: int) -> bytes:
    # Opened for each piece: a reader that pauses holds no descriptor here.
    try:
        with open_file(file) as opened:
            opened.seek(offset)
            data = opened.read(min(PIECE_BYTES, entry.size_bytes - offset))
    except FileNotFoundError:
        raise CheckpointNotFound(path) from None
    except OSError as error:
        raise CheckpointDamaged(path, file.name, problem_of(error)) from None
    if not data and offset < entry.size_bytes:
        problem = f"has {offset} bytes where {entry.size_bytes} were published"
        raise CheckpointDamaged(path, file.name, problem)
    return data
