"""Where a server is: the forms of `base_url`."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from mint.errors import InvalidInputError, refused

TRAINER_PORT = 50051
SAMPLER_PORT = 50052
_TLS_PORT = 443


@dataclass(frozen=True, slots=True)
class Address:
    """Host and port, and whether the connection is encrypted."""

    host: str
    port: int
    tls: bool

    @property
    def target(self) -> str:
        """As gRPC wants it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """As `parse_address` reads it."""
        return f"{'https' if self.tls else 'http'}://{self.target}"

    @property
    def loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def parse_address(url: str, name: str, default_port: int = TRAINER_PORT) -> Address:
    """Reads `host`, `host:port` or `http(s)://host[:port][/]`. `name` is what the caller calls it.

    Without a port, https means 443, anything else `default_port`.
    """
    text = url.strip()
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError as error:
        raise _refusal(name, url, str(error).lower()) from None
    if parts.scheme not in ("http", "https"):
        raise _refusal(name, url, f"its scheme is {parts.scheme!r}")
    if not parts.hostname or "@" in parts.netloc:
        raise _refusal(name, url, "it names no host" if not parts.hostname else "it holds a user")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise _refusal(name, url, "it has a path, which gRPC has no place for")
    tls = parts.scheme == "https"
    return Address(parts.hostname, port or (_TLS_PORT if tls else default_port), tls)


def _refusal(name: str, url: str, why: str) -> InvalidInputError:
    return refused(name, f"is {url!r}: {why}; give host:port or http(s)://host[:port]")
