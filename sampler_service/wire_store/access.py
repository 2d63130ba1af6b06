"""How a sampler reaches the trainer whose adapters it serves."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mint_core.addresses import is_loopback

_PORT, _TLS_PORT = 50051, 443  # where the address names none


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerAccess:
    """What a sampler was told. Raises ValueError, which names the option."""

    address: str  # http(s)://HOST[:PORT]
    key: Path | None = None  # file that holds the API key
    ca: Path | None = None  # authorities of the trainer's certificate; None: the well-known ones
    cert: Path | None = None  # the sampler's own certificate
    cert_key: Path | None = None
    allow_insecure: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.address)
        odd = parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc
        if odd or not self.host or not self.port:
            raise ValueError(f"`store` {self.address} is no trainer's; write https://HOST:PORT")
        given = {
            "store_tls_ca": self.ca,
            "store_tls_cert": self.cert,
            "store_tls_key": self.cert_key,
        }
        for name, file in given.items():
            if file is not None and not self.tls:
                raise ValueError(f"`{name}` is of no use to `store` {self.address}; write https://")
        if (self.cert is None) != (self.cert_key is None):
            raise ValueError("`store_tls_cert` and `store_tls_key` go together; give both")
        if not (self.tls or is_loopback(self.host) or self.allow_insecure):
            raise ValueError(
                f"`store` {self.address} is another host and so needs TLS; write https://, or give "
                "--allow-insecure, which lets keys and adapters cross the network readable"
            )

    @property
    def tls(self) -> bool:
        return self.address.startswith("https://")

    @property
    def host(self) -> str:
        return urlsplit(self.address).hostname or ""

    @property
    def port(self) -> int:
        """Raises ValueError."""
        try:
            return urlsplit(self.address).port or (_TLS_PORT if self.tls else _PORT)
        except ValueError:
            raise ValueError(f"`store` {self.address} has no such port") from None

    @property
    def target(self) -> str:
        """As gRPC wants it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def files(self) -> Iterator[Path]:
        """Those that may change while the sampler runs."""
        yield from (f for f in (self.key, self.ca, self.cert, self.cert_key) if f is not None)
