"""What a checkpoint says of itself: `manifest.json`."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from checkpoint_store.paths import (
    KINDS,
    NAME,
    CheckpointKind,
    CheckpointPath,
    check_name,
    check_new_name,
    generated_name,
)
from mint_core.lora.spec import AdapterSpec

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
UNUSED_LIMIT_S = 24 * 3600  # of what is kept for as long as it is used


Maker = tuple[str, str, int]  # request, or else the mark of a call, or else its sequence


@dataclass(frozen=True, slots=True)
class FileEntry:
    size_bytes: int
    sha256: str  # hexadecimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One revision. Times are aware, in UTC."""

    tenant: str
    training_run_id: str
    kind: CheckpointKind
    name: str = ""  # empty until `new_manifest` has given it
    revision: int = 0  # until the store has numbered it
    base_model: str
    base_fingerprint: str
    spec: AdapterSpec
    step: int
    create_time: datetime = field(default_factory=lambda: datetime.now(UTC))
    expire_time: datetime | None = None  # None: kept until deleted, or as `unused_limit_s` says
    unused_limit_s: int | None = None  # set on unnamed snapshots: kept this long after the last use
    metadata: Mapping[str, str] = field(default_factory=dict)
    source: str = ""  # path, with revision, of what it is a copy of or was merged from
    dtype: str = ""  # of a merged model: "base": its base's own
    head_untied: bool = False  # of a merged model: whether its head was tied in the base model
    request: str = ""  # digest of the request that made it, which makes it once; empty: of none
    sequence: int = 0  # of the run's call that saved it; 0: of none
    # Drawn at random for that call: one of the same number after a backup was restored is another.
    mark: str = ""
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    files_folder: str = ""  # in the name's folder; empty: they are beside the manifest

    @property
    def maker(self) -> Maker:
        """What makes the revision once: a request, or a call of its run. Calls of servers that drew
        no marks are known by their numbers.
        """
        return self.request, self.mark, 0 if self.mark else self.sequence

    @property
    def path(self) -> CheckpointPath:
        """Of the name."""
        return CheckpointPath(self.training_run_id, self.kind, self.name)

    @property
    def revision_path(self) -> CheckpointPath:
        return self.path.at(self.revision or None)

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files.values())

    @property
    def named(self) -> bool:
        """False for a snapshot whose name was generated."""
        return self.unused_limit_s is None


def new_manifest(name: str | None, said: Manifest) -> Manifest:
    """Of a checkpoint that is about to be made; without a name, of an unnamed snapshot."""
    check_name(said.training_run_id, field="training_run_id")
    if name is None:
        unnamed = generated_name()
        return replace(said, name=unnamed, revision=1, unused_limit_s=UNUSED_LIMIT_S)
    return replace(said, name=check_new_name(name))


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON that ends in its own digest, so that damage to the manifest shows too."""
    content = asdict(manifest)
    content["format_version"] = FORMAT_VERSION
    content["adapter"] = content.pop("spec")
    content["create_time"] = manifest.create_time.isoformat()
    content["expire_time"] = manifest.expire_time and manifest.expire_time.isoformat()
    return json.dumps(content | {"manifest_sha256": digest_of(content)}, indent=1).encode()


def decode_manifest(encoded: bytes) -> Manifest:
    """Raises ValueError with what is wrong."""
    try:
        content: dict[str, Any] = json.loads(encoded)
        matches = content.pop("manifest_sha256") == digest_of(content)
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        raise ValueError("is torn or not a manifest") from None
    if not matches:
        raise ValueError("does not match its own SHA-256")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"has format version {version!r} where {FORMAT_VERSION} is read here")
    content["spec"] = content.pop("adapter", None)
    said = {}
    for name in content.keys() & _READ.keys():  # older manifests lack some
        try:
            said[name] = _READ[name](content[name])
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            raise ValueError(f"garbles `{name}`") from None
    try:
        return Manifest(**said)
    except TypeError as error:
        raise ValueError(f"lacks a field: {error}") from None


def _text(value: Any) -> str:
    value.encode()  # halves of surrogate pairs are refused: no message takes them
    return sys.intern(value)  # many manifests say the same


def _like(pattern: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if re.fullmatch(pattern, value, re.ASCII) is None:
            raise ValueError
        return _text(value)

    return read


def _within(kind: type, least: float, below: float) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        found: type = type(value)  # a flag is no count
        if found is not kind or not least <= value < below:
            raise ValueError
        return value

    return read


def _time(value: Any) -> datetime | None:
    time = None if value is None else datetime.fromisoformat(value)
    if time and (time.tzinfo is None or not 1970 <= time.year < 9000):  # no way to reckon with it
        raise ValueError
    return time and time.astimezone(UTC)


_name, _sha256, _count = _like(NAME), _like("[0-9a-f]{64}"), _within(int, 0, 2**63)
_flag, _number = _within(bool, 0, 2), _within(float, 0, float("inf"))
_SPEC: Mapping[str, Callable[[Any], Any]] = {
    "rank": _count,
    "alpha": lambda value: _number(float(value)),
    "use_rslora": _flag,
    "seed": _count,
    "modules": lambda value: tuple(map(_text, value)),
}
# What of a manifest may be believed: how each field is read, or refused.
_READ: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("tenant", "base_model", "base_fingerprint", "source"), _text),
    **dict.fromkeys(("request", "mark", "dtype"), _text),
    **dict.fromkeys(("training_run_id", "name"), _name),
    **dict.fromkeys(("revision", "step", "sequence"), _count),
    **dict.fromkeys(("create_time", "expire_time"), _time),
    "kind": KINDS.__getitem__,
    "spec": lambda value: AdapterSpec(**{key: _SPEC[key](value[key]) for key in _SPEC}),
    "unused_limit_s": lambda value: value if value is None else min(_count(value), UNUSED_LIMIT_S),
    "metadata": lambda value: {_text(key): _text(text) for key, text in value.items()},
    "head_untied": _flag,
    "files": lambda value: {
        _name(name): FileEntry(_count(entry["size_bytes"]), _sha256(entry["sha256"]))
        for name, entry in value.items()
    },
    "files_folder": _like(f"|{NAME}"),
}


def digest_of(content: dict[str, Any]) -> str:
    """Of a header that will hold it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
