"""A trainer that is asked for adapters."""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from mint_core.errors import FailedPrecondition
from mint_core.watched_file import WatchedFile, read_file
from mintrpc.v1 import checkpoint_pb2, checkpoint_pb2_grpc, model_pb2, model_pb2_grpc
from sampler_service.wire_store.access import TrainerAccess
from sampler_service.wire_store.errors import StoreRefused, StoreUnreachable, error_of
from sampler_service.wire_store.trouble import tls_context, trouble

logger = logging.getLogger(__name__)

FEATURE = "for_tenant"
GREETING_S = 5.0
ANSWER_S = 20.0  # of a call with one answer, gRPC's own attempts included
STREAM_S = 60.0  # of one download, which goes on in the next: a trainer that hangs is noticed
_RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": "mintrpc.v1.CheckpointService", "method": "GetCheckpoint"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_OPTIONS = [
    ("grpc.service_config", json.dumps(_RETRIES)),
    ("grpc.use_local_subchannel_pool", 1),
    # gRPC would wait up to 2 minutes before it tries a trainer again that has come back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]

Pieces = Iterator[checkpoint_pb2.DownloadCheckpointResponse]


class Trainer:
    """Blocking calls, safe from any thread. Raises StoreUnreachable, StoreRefused."""

    def __init__(self, access: TrainerAccess) -> None:
        """Raises FailedPrecondition over files that cannot be used."""
        self.access = access
        self._watched = [WatchedFile(file) for file in access.files()]
        self._lock = threading.Lock()
        self._closed = False
        self._connect()

    def greet(self) -> None:
        """Refuses a trainer that is there and will not do; one that is away may come later."""
        stub, metadata = model_pb2_grpc.ModelServiceStub(self._channel), self._metadata
        request = model_pb2.GetServerCapabilitiesRequest()
        try:
            with self._told(""):
                told = stub.GetServerCapabilities(request, timeout=GREETING_S, metadata=metadata)
        except StoreUnreachable as away:
            logger.warning("%s", away.message)
            return
        if FEATURE not in told.features:
            what = "a trainer of an older version"
            if told.role != model_pb2.SERVICE_ROLE_TRAINER:
                what = "no trainer"
            raise StoreRefused(self.access.address, f"it is {what}; --store must name another")

    def checkpoint(self, path: str, tenant: str) -> checkpoint_pb2.Checkpoint:
        """What a path means now. Raises CheckpointNotFound, CheckpointDamaged."""
        request = checkpoint_pb2.GetCheckpointRequest(path=path, for_tenant=tenant)
        stub, metadata = self._ways()
        with self._told(path):
            answer = stub.GetCheckpoint(request, timeout=ANSWER_S, metadata=metadata)
        found: checkpoint_pb2.Checkpoint = answer.checkpoint
        return found

    def pieces(self, request: checkpoint_pb2.DownloadCheckpointRequest) -> Pieces:
        """A file from a place on, as far as one call brings it. Raises as `checkpoint`."""
        stub, metadata = self._ways()
        with self._told(request.path):
            yield from stub.DownloadCheckpoint(request, timeout=STREAM_S, metadata=metadata)

    def close(self) -> None:
        """Ends the calls under way, and those to come."""
        with self._lock:
            self._closed = True
            self._channel.close()

    @property
    def closed(self) -> bool:
        return self._closed

    def _ways(self) -> tuple[Any, Any]:
        """The stub, and what goes with each call, by the files as they are now."""
        with self._lock:
            if True in [file.changed() for file in self._watched]:  # each takes its look
                try:
                    self._connect()
                except FailedPrecondition as error:
                    logger.error("the way to the trainer stays as it was: %s", error.message)
            return self._stub, self._metadata

    def _connect(self) -> None:
        access = self.access
        key = _read(access.key, "store_api_key").decode(errors="replace").strip()
        if not key.isascii() or not key.isprintable():
            raise FailedPrecondition(f"`store_api_key` {access.key} holds no API key")
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()
        if access.tls:
            tls_context(access)
            ca, cert_key, cert = (
                _read(file, name) or None
                for name, file in (
                    ("store_tls_ca", access.ca),
                    ("store_tls_key", access.cert_key),
                    ("store_tls_cert", access.cert),
                )
            )
            credentials = grpc.ssl_channel_credentials(ca, cert_key, cert)
            self._channel = grpc.secure_channel(access.target, credentials, _OPTIONS)
        else:
            self._channel = grpc.insecure_channel(access.target, _OPTIONS)
        self._stub = checkpoint_pb2_grpc.CheckpointServiceStub(self._channel)

    @contextmanager
    def _told(self, path: str) -> Iterator[None]:
        address = self.access.address
        try:
            yield
        except ValueError:  # gRPC's word for a channel that is closed
            raise StoreUnreachable(address, "this sampler is stopping") from None
        except grpc.RpcError as failure:
            error = error_of(failure, address, path)
            if isinstance(error, StoreUnreachable) and (problem := trouble(self.access)):
                error = StoreRefused(address, problem)
            raise error from None


def _read(file: Any, name: str) -> bytes:
    try:
        return read_file(file) if file else b""
    except OSError as error:
        raise FailedPrecondition(f"`{name}` {file} cannot be read: {error.strerror}") from error
