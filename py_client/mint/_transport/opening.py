"""How clients come to their servers: what was given, or what the environment says."""

import math
from collections.abc import Mapping

from mint._transport.address import parse_address
from mint._transport.connection import Settings
from mint._transport.environment import DEFAULT_BASE_URL, Environment, read_environment
from mint._transport.servers import Servers
from mint.errors import refused
from mint.types._checks import number, text, text_map

DEFAULT_TIMEOUT_S = 3600.0


def open_servers(
    base_url: str | None,
    api_key: str | None,
    timeout: float | None,
    default_headers: Mapping[str, str] | None,
) -> tuple[Environment, Servers]:
    """Reads the environment. Nothing is sent yet."""
    environment = read_environment()
    settings = Settings(
        api_key=text(api_key or environment.api_key, "api_key").strip(),
        headers=text_map(default_headers, "default_headers"),
        timeout_s=_timeout(timeout),
    )
    url = base_url or environment.base_url or DEFAULT_BASE_URL
    address = parse_address(text(url, "base_url"), "base_url")
    return environment, Servers(address, settings, environment.sampler_url)


def _timeout(timeout: float | None) -> float:
    if timeout is None:
        return DEFAULT_TIMEOUT_S
    seconds = number(timeout, "timeout")
    if math.isnan(seconds) or seconds <= 0:
        raise refused("timeout", f"is {timeout}; give a positive number of seconds")
    return seconds
