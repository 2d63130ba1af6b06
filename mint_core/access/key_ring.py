"""API keys while a service runs, and the command that makes one."""

import argparse
import logging
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NoReturn

from mint_core.access.key_file import SCOPES, Key, add_key, digest_of, parse_time, read_keys
from mint_core.errors import MintError, Unauthenticated
from mint_core.watched_file import WatchedFile

logger = logging.getLogger(__name__)


class KeyRing:
    """The keys of a file, which is read again when it has changed."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._watched = WatchedFile(file)
        self.version = 0  # of what was read
        self._take(read_keys(file))
        self.last_use_s: dict[str, float] = {}  # by id, since 1970

    def find(self, secret: str | None) -> Key:
        """The line of a key. Raises Unauthenticated."""
        if not secret:
            raise Unauthenticated(
                "the call carries no API key; set MINT_API_KEY or give `api_key`, which send"
                " metadata `authorization: Bearer KEY`"
            )
        self.refresh()
        key = self._keys.get(digest_of(secret))
        if key is None:
            raise Unauthenticated("the API key is not known to this server; check MINT_API_KEY")
        if key.expires and key.expired:
            raise Unauthenticated(
                f"the API key {key.id} expired on {key.expires.isoformat()}; ask for a new one"
            )
        self.last_use_s[key.id] = time.time()
        return key

    def all(self) -> Collection[Key]:
        self.refresh()
        return self._keys.values()

    def weight_of(self, tenant: str) -> float:
        """How many times the share of a tenant of weight 1 is a tenant's, as last read."""
        return self._weights.get(tenant, 1.0)

    def refresh(self) -> None:
        """Takes in what has changed."""
        if not self._watched.changed():
            return
        try:
            self._take(read_keys(self.file))
            logger.info("keys read again file=%s keys=%d", self.file, len(self._keys))
        except MintError as error:
            # An editor's half-written file must not lock everybody out.
            logger.error("keys kept as they were: %s", error.message)

    def _take(self, keys: Mapping[str, Key]) -> None:
        self._keys = keys
        self._weights = {key.tenant: key.weight for key in keys.values() if key.weight}
        self.version += 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(f"error: {message}; such as `make key TENANT=ada KEYS=keys.txt`")


def main() -> None:
    parser = _Parser(prog="mint_core.access.key_ring", description="Makes a key and prints it.")
    parser.add_argument("tenant")
    parser.add_argument("file", type=Path, help="of hashed keys; made if need be")
    parser.add_argument(
        "--scopes",
        type=lambda text: frozenset(text.split(",")),
        metavar="A,B",
        help=f"what it may do, of {', '.join(SCOPES)} (default: the first three)",
    )
    parser.add_argument("--expires", type=parse_time, metavar="TIME", help="such as 2030-12-31")
    parser.add_argument("--weight", type=float, help="of the tenant, in fair shares")
    parser.add_argument("--comment", help="whose it is, or what for")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value}
    try:
        secret, _ = add_key(given.pop("file"), given.pop("tenant", ""), **given)
    except (MintError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(secret + "\n")


if __name__ == "__main__":
    main()
