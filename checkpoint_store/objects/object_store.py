"""An S3-compatible object store, by obstore: it signs, tries again, and sends large files in parts.

An object is there, whole, from the moment at which its put has ended; other keys know nothing of
it.
"""

import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit
from uuid import uuid4

from checkpoint_store.errors import ObjectStoreFailed
from checkpoint_store.store_files import check_small
from mint_core.errors import FailedPrecondition

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, RetryConfig, S3Config, S3Store

logger = logging.getLogger(__name__)

_RETRIES: "RetryConfig" = {"max_retries": 8, "retry_timeout": timedelta(seconds=60)}
_RETRIES_AT_START: "RetryConfig" = {"max_retries": 2, "retry_timeout": timedelta(seconds=20)}
_PIECE_BYTES = 4 * 1024 * 1024
_FORM = "s3://BUCKET/PREFIX, with ?endpoint=URL and &region=NAME where it is not Amazon's"


@dataclass(frozen=True, slots=True)
class ObjectAddress:
    """Where in an object store the checkpoints lie."""

    bucket: str
    prefix: str = ""
    endpoint: str = ""  # empty: as the environment says, or Amazon's
    region: str = ""

    def __str__(self) -> str:
        place = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        return f"{place} at {self.endpoint}" if self.endpoint else place


def is_object_address(store: str) -> bool:
    """Whether this is no folder."""
    return "://" in store


def parse_address(store: str) -> ObjectAddress:
    """Takes a `store` apart. Raises FailedPrecondition with what is wrong with it."""
    parts = urlsplit(store)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    problem = ""
    if parts.scheme != "s3":
        problem = f"has the scheme `{parts.scheme}`"
    elif not parts.netloc or "@" in parts.netloc:
        problem = "names no bucket, or more than one"  # a key would come before an `@`
    elif odd := sorted(set(options) - {"endpoint", "region"}):
        problem = f"has the option `{odd[0]}`"
    elif not options.get("endpoint", "http://").startswith(("http://", "https://")):
        problem = "has an endpoint that begins with neither http:// nor https://"
    if problem or parts.fragment:
        raise FailedPrecondition(f"`store` {problem or 'has a `#`'}; write a folder, or {_FORM}")
    return ObjectAddress(bucket=parts.netloc, prefix=parts.path.strip("/"), **options)


class ObjectStore:
    """Blocking calls, safe from any thread. Raises ObjectStoreFailed where nothing else is said."""

    def __init__(self, address: ObjectAddress, *, conditional: bool = True) -> None:
        """`conditional`: whether it creates objects only where there are none."""
        self.address = address
        self._s3 = _connect(address, _RETRIES)
        self._conditional = conditional

    def check(self, *, saves: bool) -> None:
        """Refuses a store that cannot be read or, if this process saves, be written to. Finds out
        whether it is conditional.
        """
        s3 = _connect(self.address, _RETRIES_AT_START)
        try:
            s3.list_with_delimiter(self.address.prefix or None)
            if saves:
                self._conditional = self._creates_once(s3)
        except _errors() as error:
            raise FailedPrecondition(
                f"`store` {self.address} cannot be used: {_brief(error)}; check bucket, endpoint "
                "and the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            ) from error
        if not self._conditional:
            logger.warning(
                "%s overwrites objects that are to be created: of two trainers that save under "
                "one name at the same moment, the one that is later wins",
                self.address,
            )

    def read(self, key: str) -> bytes:
        """A small object's content. Raises FileNotFoundError, or OSError over a large one."""
        with self._asking(key):
            found = self._s3.get(key)
            check_small(found.meta["size"])
            return bytes(found.bytes())

    def download(self, key: str, file: Path) -> None:
        """Writes an object's content to a file. Raises FileNotFoundError."""
        with self._asking(key), file.open("wb") as opened:
            for piece in self._s3.get(key).stream(min_chunk_size=_PIECE_BYTES):
                opened.write(piece)

    def write(self, key: str, content: bytes | Path) -> None:
        """Makes or replaces an object, of a file's content if it is a path."""
        with self._asking(key):
            self._s3.put(key, content)

    def create(self, key: str, content: bytes) -> bool:
        """Makes an object if there is none; returns whether there is this one now. Contents of
        different writers differ.
        """
        from obstore.exceptions import AlreadyExistsError

        with self._asking(key):
            if self._conditional:
                with suppress(AlreadyExistsError):
                    self._s3.put(key, content, mode="create")
                    return True
            elif self.find(key) is None:
                self._s3.put(key, content)
        try:  # the first of several attempts may have come to its end without our knowing
            return self.read(key) == content
        except FileNotFoundError:
            return False

    def find(self, key: str) -> datetime | None:
        """When an object was written last; None: there is none."""
        try:
            with self._asking(key):
                return self._s3.head(key)["last_modified"]
        except FileNotFoundError:
            return None

    def children(self, key: str) -> tuple[list[str], list[str]]:
        """Keys right below a key: those that have others below them, and objects."""
        with self._asking(key):
            found = self._s3.list_with_delimiter(key or None)
        objects = [entry["path"] for entry in found["objects"] if entry["path"] != key]
        return list(found["common_prefixes"]), objects

    def below(self, key: str) -> dict[str, "ObjectMeta"]:
        """All objects below a key."""
        with self._asking(key):
            pages = list(self._s3.list(key))
        return {entry["path"]: entry for page in pages for entry in page}

    def remove(self, key: str) -> None:
        """Removes an object, if there is one."""
        with self._asking(key), suppress(FileNotFoundError):
            self._s3.delete(key)

    def _creates_once(self, s3: "S3Store") -> bool:
        from obstore.exceptions import AlreadyExistsError, NotSupportedError

        key = f"{self.address.prefix}/.probe-{uuid4().hex}".lstrip("/")
        try:
            s3.put(key, b"1", mode="create")
            s3.put(key, b"2", mode="create")
        except AlreadyExistsError:
            return True
        except NotSupportedError:
            return False
        finally:
            with suppress(FileNotFoundError):
                s3.delete(key)
        return False

    @contextmanager
    def _asking(self, key: str) -> Iterator[None]:
        try:
            yield
        except _errors() as error:
            told, _, _ = str(error).partition("\n\nDebug source")
            logger.error("%s, key %s: %s", self.address, key, told)
            raise ObjectStoreFailed(_brief(error)) from error


def _connect(address: ObjectAddress, retries: "RetryConfig") -> "S3Store":
    if importlib.util.find_spec("obstore") is None:
        raise FailedPrecondition(
            f"`store` {address} needs the package obstore; install it with "
            "`pip install 'mintrpc[s3]'`, or choose a folder"
        )
    from obstore.store import S3Store

    config: S3Config = {}  # the environment has the rest
    if address.endpoint:
        config["endpoint"] = address.endpoint
    if address.region:
        config["region"] = address.region
    options: ClientConfig = {"connect_timeout": "5s", "timeout": "60s"}
    endpoint = address.endpoint or os.environ.get("AWS_ENDPOINT_URL", "")
    if endpoint.startswith("http://"):
        options["allow_http"] = True
    return S3Store(address.bucket, config=config, client_options=options, retry_config=retries)


def _errors() -> type[Exception]:
    from obstore.exceptions import BaseError

    return BaseError


def _brief(error: Exception) -> str:
    """What an operator needs of an error that quotes whole answers."""
    text = str(error)
    status = re.search(r"status code: (\d{3}[ A-Za-z]*)", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    if status is None:
        return text.splitlines()[0][:300]
    return f"{status[1].strip()} {code[1]}" if code else status[1].strip()
