"""One server: the channel to it, who calls, and how long silence is borne."""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from mint._transport.address import SAMPLER_PORT, TRAINER_PORT, Address
from mint._transport.failures import Failure
from mint._transport.tls import TlsFiles, trouble
from mint._transport.waits import Waits
from mint._version import __version__
from mint.errors import refused
from mintrpc.v1 import (
    checkpoint_pb2_grpc,
    model_pb2_grpc,
    sampler_pb2_grpc,
    trainer_pb2_grpc,
)

logger = logging.getLogger("mint")

MAX_MESSAGE_BYTES = 256 * 1024 * 1024
_WARN_AFTER_S = 5.0
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.primary_user_agent", f"mint/{__version__}"),
    # gRPC would wait up to 2 minutes before it tries a server again that has come back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Tells a server that computes for long from one that is gone without a word.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What every call to a server has in common."""

    api_key: str = ""
    tls: TlsFiles = field(default_factory=TlsFiles)
    allow_insecure: bool = False  # whether a key may go to another host without TLS
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float  # how long a call bears a server that does not answer
    first_contact_s: float = 20.0  # the same while the server has never answered
    attempt_s: float = 300.0  # a call that waits for longer is sent again, and attached to itself


_WHERE = {
    "trainer": ("MINT_BASE_URL or `base_url`", TRAINER_PORT),
    "sampler": ("MINT_SAMPLER_URL", SAMPLER_PORT),
}


class Connection:
    """A channel and what has been heard on it. Connects when first used. Thread-safe."""

    def __init__(self, address: Address, settings: Settings, setting: str) -> None:
        """`setting` names what the address comes from."""
        self.address = address
        self._setting = setting
        self.settings = settings
        self.metadata = _metadata(settings)
        self.max_message_bytes = MAX_MESSAGE_BYTES
        self.closed = False
        self.contacted = False  # whether the server has ever answered
        self.role = ""  # "trainer" or "sampler", once it is known
        self.offered: Callable[[], Set[str]] = frozenset  # features and losses, as the server says
        self.waits = Waits(address.target, lambda: self._warned)
        self._warned = False
        self._lock = threading.Lock()
        self._trouble: str | None = None  # with the address; None: not looked for
        self._opened = _Opened(address, settings)

    @property
    def _here(self) -> "_Opened":
        """That of this process. A forked one needs its own: some versions of gRPC close in it those
        that its parent had.
        """
        if self._opened.process != os.getpid() and not self.closed:
            self._opened = _Opened(self.address, self.settings)
        return self._opened

    @property
    def model(self) -> model_pb2_grpc.ModelServiceStub:
        return self._here.model

    @property
    def trainer(self) -> trainer_pb2_grpc.TrainerServiceStub:
        return self._here.trainer

    @property
    def checkpoints(self) -> checkpoint_pb2_grpc.CheckpointServiceStub:
        return self._here.checkpoints

    @property
    def sampler(self) -> sampler_pb2_grpc.SamplerServiceStub:
        return self._here.sampler

    @property
    def patience_s(self) -> float:
        """How long a call may go without any answer before it fails."""
        settings = self.settings
        if self.contacted:
            return settings.timeout_s
        return min(settings.first_contact_s, settings.timeout_s)

    def heard(self) -> None:
        """Notes that the server has answered."""
        if not self.contacted or self._warned:
            with self._lock:
                self.contacted = True
                if self._warned:
                    self._warned = False
                    logger.warning("%s answers again", self.address.target)

    def silent(self, since: float, why: str) -> None:
        """Notes that no answer has come since a `time.monotonic()`; warns after a while."""
        silence_s = time.monotonic() - since
        if silence_s < _WARN_AFTER_S or self._warned:
            return
        with self._lock:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "no answer from %s for %.0f s (%s); calls are sent again for %.0f s",
                    self.address.target,
                    silence_s,
                    why,
                    self.patience_s,
                )

    def trouble(self) -> str:
        """Why a server that is there and has never answered does not understand this client."""
        if self.contacted or self.closed:
            return ""
        with self._lock:
            if self._trouble is None:
                self._trouble = trouble(self.address, self.settings.tls)
            return self._trouble or ""

    def explained(self, failure: Failure, *, silence_s: float = 0.0) -> Failure:
        """What the failure of a call that will not be sent again is to its user."""
        if self.closed:
            return Failure(grpc.StatusCode.UNAVAILABLE, "the client has been closed")
        message = failure.message
        if self._trouble and not failure.reason:
            message = self._trouble
        elif silence_s:
            message = (
                f"no server answered at `{self.address.target}` for {silence_s:.0f} s "
                f"({_last_words(message)}); start one there, or set {self._setting}"
            )
        elif failure.code is grpc.StatusCode.UNIMPLEMENTED and not failure.reason:
            message = (
                f"the server at `{self.address.target}` does not know this call "
                f"({message}); it is of another version than this client, {__version__}: bring "
                "both to the same; or it is no trainer or sampler at all"
            )
        elif failure.code is grpc.StatusCode.UNIMPLEMENTED and "method" in failure.metadata:
            message = self._misplaced(failure.metadata["method"]) or message
        return replace(failure, message=message)

    def _misplaced(self, method: str) -> str:
        """What to say of a call that the other of the two servers takes; empty: it is not that."""
        wanted = "sampler" if ".SamplerService/" in method else "trainer"
        if self.role in ("", wanted):
            return ""
        setting, port = _WHERE[wanted]
        return (
            f"the server at `{self.address.target}` is the {self.role}, and `{method}` is the "
            f"{wanted}'s: set {setting} to the {wanted}'s address, whose port is {port} "
            "unless it was given another"
        )

    def close(self) -> None:
        """Ends the calls that are under way here; what the server has accepted goes on there."""
        channel = self._here.channel
        self.closed = True
        channel.close()


class _Opened:
    """A process's channel to a server, and what is called on it."""

    def __init__(self, address: Address, settings: Settings) -> None:
        self.process = os.getpid()
        self.channel = _channel(address, settings)
        self.model = model_pb2_grpc.ModelServiceStub(self.channel)
        self.trainer = trainer_pb2_grpc.TrainerServiceStub(self.channel)
        self.checkpoints = checkpoint_pb2_grpc.CheckpointServiceStub(self.channel)
        self.sampler = sampler_pb2_grpc.SamplerServiceStub(self.channel)


def _channel(address: Address, settings: Settings) -> grpc.Channel:
    if settings.api_key and not (address.tls or address.loopback or settings.allow_insecure):
        raise refused(
            "api_key",
            f"would cross the network readable to {address.target}; take https://, or set "
            "MINT_ALLOW_INSECURE=1 if nobody else can listen",
        )
    options = list(_OPTIONS)
    if address.loopback:
        options.append(("grpc.enable_http_proxy", 0))
    if address.tls:
        return grpc.secure_channel(address.target, settings.tls.credentials(), options)
    return grpc.insecure_channel(address.target, options)


def _metadata(settings: Settings) -> tuple[tuple[str, str], ...]:
    if not settings.api_key.isascii() or not settings.api_key.isprintable():
        raise refused("api_key", "holds characters that no key has; check MINT_API_KEY")
    headers = {name.lower(): value for name, value in settings.headers.items()}
    if settings.api_key:
        headers["authorization"] = f"Bearer {settings.api_key}"
    return tuple(headers.items())


def _last_words(message: str) -> str:
    return message.rpartition("last error: ")[2] or "without a word"
