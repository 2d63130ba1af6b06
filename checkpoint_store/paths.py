"""How checkpoints are named."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from uuid import uuid4

from mint_core.errors import InvalidRequest

CheckpointKind = Literal["weights", "sampler_weights", "merged_weights"]
WEIGHTS: CheckpointKind = "weights"  # training state: weights, moments, step
SAMPLER_WEIGHTS: CheckpointKind = "sampler_weights"  # the adapter alone
MERGED_WEIGHTS: CheckpointKind = "merged_weights"  # a model with the adapter in it
KINDS: Mapping[str, CheckpointKind] = {
    kind: kind for kind in (WEIGHTS, SAMPLER_WEIGHTS, MERGED_WEIGHTS)
}

LEGAL_FORMS = (
    "`mint://<training_run_id>/weights/<name>` for training state or "
    "`mint://<training_run_id>/sampler_weights/<name>` for an adapter, "
    "either with `@<revision>` at its end"
)

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_PATH = re.compile(
    rf"mint://(?P<run>{NAME})/(?P<kind>{'|'.join(KINDS)})/(?P<name>{NAME})"
    r"(?:@(?P<revision>[1-9][0-9]{0,17}))?",
    re.ASCII,
)
_GENERATED_NAME = re.compile(r"snapshot-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, order=True)
class CheckpointPath:
    """A path taken apart. Without `revision` it means the newest."""

    training_run_id: str
    kind: CheckpointKind
    name: str
    revision: int | None = None

    def __str__(self) -> str:
        suffix = "" if self.revision is None else f"@{self.revision}"
        return f"mint://{self.training_run_id}/{self.kind}/{self.name}{suffix}"

    @property
    def unnamed(self) -> bool:
        """Whether the name was generated, for a snapshot of which there is one revision."""
        return _GENERATED_NAME.fullmatch(self.name) is not None

    def covers(self, revision: "CheckpointPath") -> bool:
        """Whether a revision is this one, or one of this name."""
        return self.at(None) == revision.at(None) and self.revision in (None, revision.revision)

    def at(self, revision: int | None) -> "CheckpointPath":
        return CheckpointPath(self.training_run_id, self.kind, self.name, revision)


def is_path(path: str) -> bool:
    """Whether `parse_path` takes it."""
    return _PATH.fullmatch(path) is not None


def parse_path(
    path: str, *, kind: CheckpointKind | None = None, field: str = "path"
) -> CheckpointPath:
    """Takes a path apart; with `kind`, refuses paths of the other kind."""
    match = _PATH.fullmatch(path)
    if match is None:
        raise InvalidRequest(
            f"`{field}` {path!r} is not a checkpoint path; write {LEGAL_FORMS}",
            field=field,
            path=path,
        )
    found = KINDS[match["kind"]]
    if kind is not None and found != kind:
        raise InvalidRequest(
            f"`{field}` {path!r} is of kind `{found}` where `{kind}` is needed; "
            f"write {LEGAL_FORMS}",
            field=field,
            path=path,
            kind=kind,
        )
    revision = None if match["revision"] is None else int(match["revision"])
    return CheckpointPath(match["run"], found, match["name"], revision)


def is_name(name: str) -> bool:
    """Whether a run, a checkpoint, or a file of one may be called so: none leads elsewhere."""
    return re.fullmatch(NAME, name, re.ASCII) is not None


def check_name(name: str, *, field: str = "name") -> str:
    """Returns the name, or refuses it."""
    if not is_name(name):
        raise InvalidRequest(
            f"`{field}` {name!r} cannot name a checkpoint; use 1 to 128 letters, digits, `.`, `_` "
            "and `-`, the first a letter or digit",
            field=field,
            name=name,
        )
    return name


def check_new_name(name: str) -> str:
    """Returns a name that a checkpoint may be given, or refuses it."""
    if _GENERATED_NAME.fullmatch(name):
        raise InvalidRequest(
            f"`name` {name!r} has the form of those that unnamed snapshots get; choose another",
            field="name",
            name=name,
        )
    return check_name(name)


def generated_name() -> str:
    return f"snapshot-{uuid4().hex}"
