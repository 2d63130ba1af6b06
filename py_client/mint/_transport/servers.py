"""The two servers that a client talks to, and what is known of them."""

import threading
import time
from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any, TypeVar

from mint import types
from mint._transport.address import SAMPLER_PORT, Address, parse_address
from mint._transport.call import Call
from mint._transport.connection import Connection, Settings
from mint.errors import NotFoundError
from mintrpc.v1 import model_pb2

T = TypeVar("T")
_LOADING_RETRY_S = 0.5


class Servers:
    """The trainer, and the sampler once it is needed. Thread-safe."""

    def __init__(self, trainer: Address, settings: Settings, sampler_url: str) -> None:
        self._settings = settings
        self.trainer = self._connected(trainer, "MINT_BASE_URL or `base_url`")
        self._sampler_url = sampler_url
        self._sampler: Connection | None = None
        self._capabilities: dict[Connection, types.GetServerCapabilitiesResponse] = {}
        self._made: dict[str, Any] = {}
        self._lock = threading.RLock()

    def capabilities(
        self, connection: Connection, *, fresh: bool = False
    ) -> types.GetServerCapabilitiesResponse:
        """What a server can do; asked once, when it has a model, unless `fresh`."""
        with self._lock:
            known = self._capabilities.get(connection)
            if fresh or known is None or not known.supported_models:
                request = model_pb2.GetServerCapabilitiesRequest()
                convert = types.GetServerCapabilitiesResponse.from_proto
                method = connection.model.GetServerCapabilities
                known = Call(connection, method, request, convert).ask()
                self._capabilities[connection] = known
                connection.role = known.role
        if known.limits.max_message_bytes:
            connection.max_message_bytes = known.limits.max_message_bytes
        return known

    def sampler(self) -> Connection:
        """The sampler: at MINT_SAMPLER_URL, else where the trainer says, else at its usual port."""
        with self._lock:
            if self._sampler is None:
                address = self._sampler_address()
                if address == self.trainer.address:
                    self._sampler = self.trainer
                else:
                    self._sampler = self._connected(address, "MINT_SAMPLER_URL")
            return self._sampler

    def once(self, key: str, make: Callable[[], T]) -> T:
        """What `make` gives, made once for all clients of these servers."""
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            made: T = self._made[key]
            return made

    def close(self) -> None:
        self.trainer.close()
        if self._sampler is not None:
            self._sampler.close()

    def _connected(self, address: Address, setting: str) -> Connection:
        connection = Connection(address, self._settings, setting)
        connection.offered = partial(self._offered, connection)
        return connection

    def _offered(self, connection: Connection) -> Set[str]:
        known = self.capabilities(connection)
        return {*known.features, *known.loss_fns}

    def _sampler_address(self) -> Address:
        if self._sampler_url:
            return parse_address(self._sampler_url, "MINT_SAMPLER_URL", SAMPLER_PORT)
        trainer = self.capabilities(self.trainer)
        if trainer.role == "sampler":
            return self.trainer.address
        if trainer.sampler_address:
            return parse_address(trainer.sampler_address, "sampler_address", SAMPLER_PORT)
        return Address(self.trainer.address.host, SAMPLER_PORT, self.trainer.address.tls)

    def _models(self, connection: Connection) -> Sequence[types.SupportedModel]:
        """What a server serves; waits while it still loads, as it does after a restart."""
        since = time.monotonic()
        while not (models := self.capabilities(connection).supported_models):
            if connection.closed or time.monotonic() - since > connection.patience_s:
                break
            connection.silent(since, "its base model is still being loaded")
            time.sleep(_LOADING_RETRY_S)
        return models

    def served(self, connection: Connection, base_model: str | None = None) -> types.SupportedModel:
        """The served model of that name, or the one that is served."""
        models = self._models(connection)
        for model in models:
            if base_model in (None, "", model.model_name):
                return model
        names = ", ".join(model.model_name for model in models) or "no model yet"
        raise NotFoundError(
            f"`base_model` {base_model!r} is not served at `{connection.address.target}`, "
            f"which serves {names}",
            reason="BASE_MODEL_NOT_FOUND",
            metadata={"base_model": base_model or "", "served": names},
            field="base_model",
        )
