"""Sampling clients as text, for other processes."""

import base64
import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from weakref import WeakValueDictionary

from mint._transport.address import parse_address
from mint._transport.connection import Connection, Settings
from mint._transport.environment import read_environment
from mint._transport.servers import Servers
from mint.errors import refused
from mint.types._checks import text

_shared: "WeakValueDictionary[tuple[object, ...], Servers]" = WeakValueDictionary()
_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """What a sampling client is, but for its key."""

    sampler_url: str
    model_path: str
    base_model: str
    timeout_s: float
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, sampler: Connection, model_path: str, base_model: str) -> "Handle":
        settings = sampler.settings
        return cls(
            sampler_url=sampler.address.url,
            model_path=model_path,
            base_model=base_model,
            timeout_s=settings.timeout_s,
            headers={k: v for k, v in settings.headers.items() if k.lower() != "authorization"},
        )

    @classmethod
    def parse(cls, handle: str) -> "Handle":
        try:
            return cls(**json.loads(base64.urlsafe_b64decode(text(handle, "handle"))))
        except (ValueError, TypeError):
            raise refused("handle", "is not what get_sampler_handle() gives") from None

    def __str__(self) -> str:
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode()

    def servers(self, api_key: str | None) -> Servers:
        """The sampler, with one connection for all clients of this process that came this way."""
        key = api_key or read_environment().api_key
        settings = Settings(
            api_key=text(key, "api_key").strip(),
            headers=self.headers,
            timeout_s=self.timeout_s,
        )
        known = (self.sampler_url, settings.api_key, self.timeout_s, *sorted(self.headers.items()))
        address = parse_address(self.sampler_url, "handle")
        with _lock:
            if (servers := _shared.get(known)) is None or servers.closed:
                servers = _shared[known] = Servers(address, settings, self.sampler_url)
            return servers
