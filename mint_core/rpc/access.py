"""API keys and the tenants they belong to. Only hashes are kept: a key is printed once."""

import hashlib
import hmac
import logging
import os
import re
import secrets
import sys
from pathlib import Path

from mint_core.errors import FailedPrecondition, MintError, Unauthenticated
from mint_core.rpc.watched_file import WatchedFile

logger = logging.getLogger(__name__)

KEY_PREFIX = "sk-mint-"
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ENTRY = re.compile(
    rf"\s*([0-9a-f]{{64}})\s+({TENANT.pattern})(?:\s+([0-9]{{1,3}}(?:\.[0-9]{{1,6}})?))?\s*"
)
LEAST_WEIGHT, MOST_WEIGHT = 0.01, 100.0


class KeyRing:
    """The keys of a file, one `HASH TENANT` or `HASH TENANT WEIGHT` a line. The file is read again
    when it has changed.
    """

    def __init__(self, file: Path) -> None:
        self._file = WatchedFile(file)
        self._tenants, self._weights = _read(file)
        self.version = 0  # of what was read

    def tenant_of(self, key: str | None) -> str:
        """Returns whose key it is. Raises Unauthenticated."""
        if not key:
            raise Unauthenticated(
                "the call carries no API key; set MINT_API_KEY, or send metadata"
                " `authorization: Bearer KEY`"
            )
        self.refresh()
        digest = _digest(key)
        found = None
        for known, tenant in self._tenants.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise Unauthenticated("the API key is not known to this server; check MINT_API_KEY")
        return found

    def weight_of(self, tenant: str) -> float:
        """How many times the share of a tenant of weight 1 is a tenant's, as last read."""
        return self._weights.get(tenant, 1.0)

    def refresh(self) -> None:
        """Takes in what has changed."""
        if not self._file.changed():
            return
        try:
            self._tenants, self._weights = _read(self._file.path)
            self.version += 1
            logger.info("keys read again file=%s keys=%d", self._file.path, len(self._tenants))
        except MintError as error:
            # An editor's half-written file must not lock everybody out.
            logger.error("keys kept as they were: %s", error.message)


def make_key(tenant: str, file: Path) -> str:
    """Returns a new key after adding its hash to the file, which is made if need be."""
    if not TENANT.fullmatch(tenant):
        raise FailedPrecondition(
            f"`tenant` {tenant!r} cannot be a name; take 1 to 64 letters, digits, `.`, `_` or `-`,"
            " the first a letter or digit"
        )
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "r+b") as lines:
        text = lines.read()
        gap = b"\n" if text and not text.endswith(b"\n") else b""
        lines.write(gap + f"{_digest(key)} {tenant}\n".encode())
    return key


def _digest(key: str) -> str:
    # Keys are random and long: one round of a plain hash is enough.
    return hashlib.sha256(key.encode()).hexdigest()


def _read(file: Path) -> tuple[dict[str, str], dict[str, float]]:
    """Tenants by hash, and weights by tenant where a line gives one."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise FailedPrecondition(
            f"`keys` file {file} cannot be read: {why}; `make key` makes one"
        ) from error
    tenants: dict[str, str] = {}
    weights: dict[str, float] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        entry = _ENTRY.fullmatch(line)
        if entry is None or not LEAST_WEIGHT <= float(entry[3] or 1) <= MOST_WEIGHT:
            raise FailedPrecondition(
                f"`keys` file {file} has a bad line {number}; a line is a SHA-256 in hexadecimal,"
                " a space and a tenant, and may end in a space and the tenant's weight,"
                f" {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
            )
        digest, tenant, weight = entry.groups()
        tenants[digest] = tenant
        if weight and weights.setdefault(tenant, float(weight)) != float(weight):
            raise FailedPrecondition(
                f"`keys` file {file} gives the tenant {tenant} another weight in line"
                f" {number}; one of its lines is enough"
            )
    return tenants, weights


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m mint_core.rpc.access TENANT FILE")
    try:
        sys.stdout.write(make_key(sys.argv[1], Path(sys.argv[2])) + "\n")
    except (MintError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
