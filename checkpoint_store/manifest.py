"""What a checkpoint says of itself: `manifest.json`."""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from checkpoint_store.paths import (
    KINDS,
    CheckpointKind,
    CheckpointPath,
    check_name,
    check_new_name,
    generated_name,
    is_name,
)
from mint_core.lora.spec import AdapterSpec

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
UNUSED_LIMIT_S = 24 * 3600  # of what is kept for as long as it is used


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
    dtype: str = ""  # of a merged model: as it was asked for; empty: the base model's own
    head_untied: bool = False  # of a merged model: whether its head was tied in the base model
    request: str = ""  # digest of the request that made it, which makes it once; empty: of none
    sequence: int = 0  # of the run's call that saved it; 0: of none
    # Drawn at random for that call: one of the same number after a backup was restored is another.
    mark: str = ""
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    files_folder: str = ""  # in the name's folder; empty: they are beside the manifest

    @property
    def maker(self) -> tuple[str, str, int] | None:
        """What makes the revision once: a request, or a call of its run. Calls of servers that drew
        no marks are known by their numbers.
        """
        maker = self.request, self.mark, 0 if self.mark else self.sequence
        return maker if any(maker) else None

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
    return json.dumps(content | {"manifest_sha256": _digest(content)}, indent=1).encode()


def decode_manifest(encoded: bytes) -> Manifest:
    """Raises ValueError with what is wrong."""
    try:
        content: dict[str, Any] = json.loads(encoded)
        matches = content.pop("manifest_sha256") == _digest(content)
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
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"garbles `{name}`") from None
    try:
        return Manifest(**said)
    except TypeError as error:
        raise ValueError(f"is not whole: {error}") from None


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError
    value.encode()  # half of a surrogate pair is refused: no message takes it
    return sys.intern(value)  # many manifests say the same


def _name(value: Any) -> str:
    if not is_name(value):
        raise ValueError
    return _text(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError
    return value


def _time(value: Any) -> datetime:
    time = datetime.fromisoformat(value)
    if time.tzinfo is None or not 1970 <= time.year < 9000:  # others cannot be reckoned with
        raise ValueError
    return time.astimezone(UTC)


def _optional(read: Callable[[Any], Any], nothing: object = None) -> Callable[[Any], Any]:
    return lambda value: value if value == nothing else read(value)


def _spec(value: Any) -> AdapterSpec:
    return AdapterSpec(
        rank=_count(value["rank"]),
        alpha=_number(value["alpha"]),
        use_rslora=_flag(value["use_rslora"]),
        seed=_count(value["seed"]),
        modules=tuple(map(_text, value["modules"])),
    )


def _files(value: Any) -> Mapping[str, FileEntry]:
    entries = {}
    for name, entry in value.items():
        if re.fullmatch("[0-9a-f]{64}", entry["sha256"]) is None:
            raise ValueError
        entries[_name(name)] = FileEntry(_count(entry["size_bytes"]), entry["sha256"])
    return entries


# What of a manifest may be believed: how each field is read, and refused.
_READ: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("tenant", "base_model", "base_fingerprint"), _text),
    **dict.fromkeys(("source", "request", "mark", "dtype"), _text),
    **dict.fromkeys(("training_run_id", "name"), _name),
    **dict.fromkeys(("revision", "step", "sequence"), _count),
    "kind": KINDS.__getitem__,
    "spec": _spec,
    "create_time": _time,
    "expire_time": _optional(_time),
    "unused_limit_s": _optional(lambda value: min(_count(value), UNUSED_LIMIT_S)),
    "metadata": lambda value: {_text(key): _text(text) for key, text in value.items()},
    "head_untied": _flag,
    "files": _files,
    "files_folder": _optional(_name, ""),
}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
