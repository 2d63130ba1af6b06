"""The file of API keys: a line each, with the key's hash, its tenant and what it may do. The key
itself is nowhere: it is printed once.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mint_core.errors import FailedPrecondition, NotFound
from mint_core.watched_file import read_file

KEY_PREFIX = "sk-mint-"
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# train: all of trainer and checkpoints; sample: the sampler; read: what changes and computes
# nothing, of both; admin: AdminService; fetch: adapters of all tenants, for samplers.
SCOPES = ("train", "sample", "read", "admin", "fetch")
USUAL = frozenset(SCOPES[:3])
LEAST_WEIGHT, MOST_WEIGHT = 0.01, 100.0
_WEIGHT = re.compile(r"[0-9]{1,3}(\.[0-9]{1,6})?")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What a line says: `HASH TENANT [WEIGHT] [scopes=A,B] [expires=TIME] [# COMMENT]`."""

    digest: str  # SHA-256 of the key, in hexadecimal
    tenant: str
    weight: float | None = None  # of the tenant, in fair shares
    scopes: frozenset[str] = USUAL
    expires: datetime | None = None
    comment: str = ""

    def __post_init__(self) -> None:
        """Raises FailedPrecondition."""
        if not TENANT.fullmatch(self.tenant):
            raise FailedPrecondition(
                f"`tenant` {self.tenant!r} cannot be a name; take 1 to 64 letters, digits, `.`, "
                "`_` or `-`, the first a letter or digit",
                field="tenant",
            )
        if self.weight is not None and not LEAST_WEIGHT <= self.weight <= MOST_WEIGHT:
            raise FailedPrecondition(
                f"`weight` is {self.weight:g} and must be {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}",
                field="weight",
            )
        if not self.scopes or not self.scopes <= set(SCOPES):
            raise FailedPrecondition(
                f"`scopes` are {','.join(sorted(self.scopes))!r}; take some of {', '.join(SCOPES)}",
                field="scopes",
            )
        if not self.comment.isprintable():
            raise FailedPrecondition(
                "`comment` is more than one line of text; shorten it", field="comment"
            )

    @property
    def id(self) -> str:
        """Names it without giving it away."""
        return self.digest[:12]

    @property
    def expired(self) -> bool:
        return self.expires is not None and datetime.now(UTC) >= self.expires

    def line(self) -> str:
        words = [self.digest, self.tenant]
        if self.weight is not None:
            words.append(f"{self.weight:g}")
        if self.scopes != USUAL:
            words.append("scopes=" + ",".join(name for name in SCOPES if name in self.scopes))
        if self.expires is not None:
            words.append("expires=" + self.expires.isoformat())
        return " ".join([*words, *(["#", self.comment] if self.comment else [])])


def digest_of(key: str) -> str:
    # Keys are random and long: one round of a plain hash is enough.
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(file: Path) -> Mapping[str, Key]:
    """The keys by their digests. Raises FailedPrecondition."""
    try:
        lines = read_file(file).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise FailedPrecondition(
            f"`keys` file {file} cannot be read: {why}; `make key` makes one"
        ) from error
    keys: dict[str, Key] = {}
    weights: dict[str, float] = {}
    for number, line in enumerate(lines, start=1):
        if not line.partition("#")[0].strip():
            continue
        try:
            key = _parse(line)
        except (ValueError, FailedPrecondition) as error:
            raise FailedPrecondition(
                f"`keys` file {file} has a bad line {number} ({error}); a line is a SHA-256 in "
                "hexadecimal, a tenant, and may have the tenant's weight, scopes=A,B, "
                "expires=TIME and # a comment"
            ) from error
        if key.digest in keys:
            raise FailedPrecondition(
                f"`keys` file {file} has a key twice, again in line {number}; leave one of the two"
            )
        keys[key.digest] = key
        if key.weight and weights.setdefault(key.tenant, key.weight) != key.weight:
            raise FailedPrecondition(
                f"`keys` file {file} gives the tenant {key.tenant} another weight in line"
                f" {number}; one of its lines is enough"
            )
    return keys


def add_key(file: Path, tenant: str, **fields: object) -> tuple[str, Key]:
    """A new key and its line, which the file has then; it is made if need be. `fields`: of Key.
    Raises FailedPrecondition.
    """
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    key = Key(digest=digest_of(secret), tenant=tenant, **fields)  # type: ignore[arg-type]
    others = read_keys(file).values() if file.exists() else ()
    for other in others:
        if other.tenant == tenant and key.weight and other.weight not in (None, key.weight):
            # Two weights of a tenant would make the file unreadable.
            raise FailedPrecondition(
                f"`weight` of tenant {tenant} is {other.weight:g} by another key; leave it out, or "
                "change it in the file of keys",
                field="weight",
            )
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "r+b") as lines:
        text = lines.read()
        gap = b"\n" if text and not text.endswith(b"\n") else b""
        lines.write(gap + f"{key.line()}\n".encode())
    return secret, key


def remove_key(file: Path, key_id: str) -> Key:
    """Takes a key's line out of the file and leaves the others as they are. Raises NotFound."""
    found = [key for key in read_keys(file).values() if key.id == key_id]
    if not found:
        raise NotFound(f"there is no key `{key_id}`; ListKeys names all", key_id=key_id)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    draft = file.with_name(f".{file.name}.draft")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as kept:
        kept.writelines(line for line in lines if found[0].digest not in line)
    draft.replace(file)
    return found[0]


def parse_time(text: str) -> datetime:
    """A date or a time; in UTC unless it says otherwise. Raises ValueError."""
    time = datetime.fromisoformat(text)
    try:
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except OverflowError:
        raise ValueError(f"{text!r} is beyond the years 1 to 9999") from None


def _parse(line: str) -> Key:
    """Raises ValueError or FailedPrecondition."""
    said, _, comment = line.partition("#")
    digest, tenant, *rest = said.split() + [""] * (2 - len(said.split()))
    if not _DIGEST.fullmatch(digest):
        raise ValueError("it does not begin with 64 hexadecimal digits")
    fields: dict[str, object] = {}
    for word in rest:
        name, equals, value = word.partition("=")
        name = name if equals else "weight"
        if name in fields:
            raise ValueError(f"`{name}` is there twice")
        if name == "scopes":
            fields[name] = frozenset(value.split(","))
        elif name == "expires":
            fields[name] = parse_time(value)
        elif not equals and _WEIGHT.fullmatch(word):
            fields[name] = float(word)
        else:
            raise ValueError(f"{word!r} means nothing here")
    return Key(digest=digest, tenant=tenant, comment=comment.strip(), **fields)  # type: ignore[arg-type]
