"""The base model's tokenizer: its files from the server, kept by content, opened without a hub."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mint._files.server_tokenizer import ServerTokenizer
from mint._transport.connection import Connection
from mint._transport.opening import open_servers
from mint._transport.servers import Servers
from mint._transport.stream import Stream
from mint.errors import APIResponseValidationError
from mint.types._checks import switch
from mintrpc.v1 import model_pb2

Piece = model_pb2.GetTokenizerResponse
_SERVER_S = 2.0  # how long a server is looked for that may not be there
_SUMS = "sha256.json"  # of every file, written last: a folder without it is not complete
_FINGERPRINT = re.compile(r"[0-9a-f]{8,128}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def tokenizer_of(
    servers: Servers, connection: Connection, base_model: str, *, on_server: bool = False
) -> Any:
    """The tokenizer of a base model that is served there, a Hugging Face one, opened once.
    `on_server`: a ServerTokenizer, and nothing is fetched.
    """
    if switch(on_server, "on_server"):
        return ServerTokenizer(servers, connection, base_model)
    served = servers.served(connection, base_model)
    fingerprint = served.tokenizer_fingerprint
    return servers.once(fingerprint, lambda: _load(connection, served.model_name, fingerprint))


def served_tokenizer(base_model: str) -> Any:
    """The same, of the server that the environment names, which is not looked for for long."""
    _, servers = open_servers(None, None, _SERVER_S, None)
    try:
        return tokenizer_of(servers, servers.trainer, base_model)
    finally:
        servers.close()


def _load(connection: Connection, base_model: str, fingerprint: str) -> Any:
    """Opens a tokenizer. Its files are fetched unless the cache has them, intact."""
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise APIResponseValidationError(
            f"the server gives {fingerprint!r} as the tokenizer's fingerprint, which is no digest"
        )
    folder = cache_folder() / fingerprint
    if not _intact(folder):
        _fetch(connection, base_model, folder)
    return open_tokenizer(folder)


def open_tokenizer(name: str | Path, *, local_files_only: bool = True) -> Any:
    """The tokenizer in a folder or, unless `local_files_only`, of that name on the hub."""
    logger = logging.getLogger("transformers")
    logger.addFilter(_wanted)
    try:
        from transformers import AutoTokenizer  # slow to import
    finally:
        logger.removeFilter(_wanted)
    return AutoTokenizer.from_pretrained(
        name, local_files_only=local_files_only, trust_remote_code=False
    )


def _wanted(record: logging.LogRecord) -> bool:
    """Whether a line of the import is news: that there is no torch is none beside this client."""
    return not record.getMessage().startswith("PyTorch was not found")


def cache_folder() -> Path:
    """Where tokenizers are kept: `mint/tokenizers` under $XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mint" / "tokenizers"


class _Pieces(Stream[Piece]):
    """What the server sends of its files."""

    _attaches = False  # it starts anew

    def __init__(self, connection: Connection, base_model: str) -> None:
        self._pieces: list[Piece] = []
        request = model_pb2.GetTokenizerRequest(base_model=base_model)
        super().__init__(connection, connection.model.GetTokenizer, request)

    def all(self) -> list[Piece]:
        """Waits for the last of them."""
        next(self, None)
        return self._pieces

    def _read(self, message: Piece) -> None:
        self._pieces.append(message)

    def _opening_again(self) -> None:
        self._pieces.clear()


def _intact(folder: Path) -> bool:
    try:
        sums: dict[str, str] = json.loads((folder / _SUMS).read_text())
        return all(_sha256((folder / name).read_bytes()) == value for name, value in sums.items())
    except (OSError, ValueError):
        return False


def _fetch(connection: Connection, base_model: str, folder: Path) -> None:
    with _Pieces(connection, base_model) as stream:
        pieces = stream.all()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Its last rename takes it away, or else it is removed.
    with TemporaryDirectory(
        prefix=".staging-", dir=folder.parent, ignore_cleanup_errors=True
    ) as staging:
        sums = {}
        for name, data in _files(pieces):
            Path(staging, name).write_bytes(data)
            sums[name] = _sha256(data)
        Path(staging, _SUMS).write_text(json.dumps(sums))
        _publish(Path(staging), folder)


def _publish(staging: Path, folder: Path) -> None:
    if folder.exists() and not _intact(folder):
        shutil.rmtree(folder)
    try:
        staging.rename(folder)
    except OSError:
        if not _intact(folder):  # else another process was faster
            raise


def _files(pieces: Iterable[Piece]) -> Iterator[tuple[str, bytes]]:
    """Whole files out of their pieces, each checked against its digest."""
    whole: dict[str, bytearray] = {}
    for piece in pieces:
        if not _FILE_NAME.fullmatch(piece.name) or piece.name == _SUMS:
            raise APIResponseValidationError(f"the server names a tokenizer file {piece.name!r}")
        data = whole.setdefault(piece.name, bytearray())
        if piece.offset_bytes != len(data):
            raise APIResponseValidationError(f"pieces of `{piece.name}` are missing")
        data += piece.data
        if len(data) == piece.size_bytes:
            if _sha256(data) != piece.sha256:
                raise APIResponseValidationError(f"`{piece.name}` arrived damaged; try again")
            yield piece.name, bytes(whole.pop(piece.name))
    if whole:
        raise APIResponseValidationError(f"`{next(iter(whole))}` arrived incomplete; try again")


def _sha256(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()
