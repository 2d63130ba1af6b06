"""A real gRPC server with one checkpoint, whose transfers fail as a test says."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from mintrpc.v1 import checkpoint_pb2, checkpoint_pb2_grpc, types_pb2
from tests.unit.mint.faulty_server import WAIT_S, Fault, refuse

PIECE_BYTES = 4


@dataclass
class Checkpoints(checkpoint_pb2_grpc.CheckpointServiceServicer):
    """What a test says is in the files, and what has been asked of them."""

    files: dict[str, bytes] = field(default_factory=dict)
    # Of each download in turn: after how many pieces it ends, and how; None: it ends there as if
    # that were all.
    cuts: list[tuple[int, Fault | None]] = field(default_factory=list)
    damaged: bool = False  # whether the next download has a wrong byte
    unstored: int = 0  # how many descriptions have no files yet
    asked: list[tuple[str, int]] = field(default_factory=list)  # file and offset
    upload_faults: list[Fault] = field(default_factory=list)  # of each upload in turn, half way
    uploads: list[tuple[Any, dict[str, bytes]]] = field(default_factory=list)  # header, files

    def GetCheckpoint(self, request: Any, context: Any) -> Any:
        files = [] if self.unstored else self._described()
        self.unstored = max(0, self.unstored - 1)
        return checkpoint_pb2.GetCheckpointResponse(checkpoint=_checkpoint(files))

    def DownloadCheckpoint(self, request: Any, context: Any) -> Iterator[Any]:
        self.asked.append((request.file_name, request.offset_bytes))
        cut, fault = self.cuts.pop(0) if self.cuts else (10**9, None)
        (described,) = (f for f in self._described() if f.name == request.file_name)
        content, offset = self._content(request.file_name), request.offset_bytes
        for number in range(-((offset - len(content)) // PIECE_BYTES)):
            if number == cut:
                if fault is not None:
                    refuse(context, fault)
                return
            yield checkpoint_pb2.DownloadCheckpointResponse(
                file=described, offset_bytes=offset, data=content[offset : offset + PIECE_BYTES]
            )
            offset += PIECE_BYTES

    def UploadCheckpoint(self, requests: Iterator[Any], context: Any) -> Any:
        header = next(requests).header
        files = {file.name: b"" for file in header.files}
        for request in requests:
            files[request.piece.file_name] += request.piece.data
            if self.upload_faults:
                self.uploads.append((header, files))
                refuse(context, self.upload_faults.pop(0))
        self.uploads.append((header, files))
        return checkpoint_pb2.UploadCheckpointResponse(checkpoint=_checkpoint(header.files))

    def _content(self, name: str) -> bytes:
        content = self.files[name]
        if self.damaged:
            self.damaged = False
            return bytes([content[0] ^ 1]) + content[1:]
        return content

    def _described(self) -> list[checkpoint_pb2.CheckpointFile]:
        return [
            checkpoint_pb2.CheckpointFile(
                name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
            )
            for name, data in self.files.items()
        ]


@contextmanager
def serving(checkpoints: Checkpoints) -> Iterator[str]:
    """Yields HOST:PORT."""
    server = grpc.server(ThreadPoolExecutor(max_workers=8))
    checkpoint_pb2_grpc.add_CheckpointServiceServicer_to_server(checkpoints, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait(WAIT_S)


def _checkpoint(files: Any) -> checkpoint_pb2.Checkpoint:
    return checkpoint_pb2.Checkpoint(
        path="mint://run-1/weights/a",
        revision_path="mint://run-1/weights/a@1",
        kind=checkpoint_pb2.CHECKPOINT_KIND_TRAINING,
        lora_config=types_pb2.LoraConfig(rank=16),
        files=files,
    )
