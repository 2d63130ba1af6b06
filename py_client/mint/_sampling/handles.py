"""Sampling clients as text, for other processes."""

import base64
import json
import threading
from weakref import WeakValueDictionary

from mint._transport.address import parse_address
from mint._transport.connection import Connection, Settings
from mint._transport.opening import read_environment
from mint._transport.servers import Servers
from mint.errors import refused
from mint.types._checks import text

_shared: "WeakValueDictionary[tuple[object, ...], Servers]" = WeakValueDictionary()
_lock = threading.Lock()


def handle_of(sampler: Connection, model_path: str, base_model: str) -> str:
    """What a sampling client is, but for its key."""
    settings = sampler.settings
    parts = {
        "sampler_url": sampler.address.url,
        "model_path": model_path,
        "base_model": base_model,
        "timeout_s": settings.timeout_s,
        "headers": {k: v for k, v in settings.headers.items() if k.lower() != "authorization"},
    }
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode()


def open_handle(handle: str, api_key: str | None) -> tuple[Servers, str, str]:
    """The sampler, with one connection for all clients of this process that came this way; the
    path; the base model.
    """
    try:
        parts = json.loads(base64.urlsafe_b64decode(text(handle, "handle")))
        url, timeout_s, headers = parts["sampler_url"], parts["timeout_s"], parts["headers"]
        model_path, base_model = parts["model_path"], parts["base_model"]
    except (ValueError, TypeError, KeyError):
        raise refused("handle", "is not what get_sampler_handle() gives") from None
    key = text(api_key or read_environment()["MINT_API_KEY"], "api_key").strip()
    settings = Settings(api_key=key, headers=headers, timeout_s=timeout_s)
    address = parse_address(url, "handle")
    known = url, key, timeout_s, *sorted(headers.items())
    with _lock:
        if (servers := _shared.get(known)) is None or servers.trainer.closed:
            servers = _shared[known] = Servers(address, settings, url)
        return servers, model_path, base_model
