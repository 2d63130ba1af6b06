"""What is said of checkpoints, and of the runs that they belong to."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Self

from mint.errors import refused
from mint.types._from_proto import FromMessage, known, optional, read, time_of
from mint.types.params import LoraConfig
from mint.types.responses import TrainingRun
from mintrpc.v1 import checkpoint_pb2

# Training state, an adapter alone, or a base model with an adapter merged into it.
CheckpointType = Literal["training", "sampler", "merged"]

_TYPES: Mapping[str, CheckpointType] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "merged_weights": "merged",
}
_PATH = re.compile(r"mint://([^/@]+)/(weights|sampler_weights|merged_weights)/([^/@]+)(?:@(\d+))?")


@dataclass(frozen=True, slots=True)
class ParsedCheckpointPath:
    """A checkpoint's path, taken apart. `checkpoint_id` is `<segment>/<name>`, as in
    `sampler_weights/a`.
    """

    path: str
    training_run_id: str
    checkpoint_type: CheckpointType
    checkpoint_id: str
    revision: int | None  # None: the newest

    @classmethod
    def parse(cls, path: str) -> "ParsedCheckpointPath":
        """Raises InvalidInputError over what is no path."""
        match = _PATH.fullmatch(path) if isinstance(path, str) else None
        if match is None:
            raise refused(
                "path",
                f"is {path!r}; give mint://<training_run_id>/<segment>/<name>, with "
                "@<revision> or without, where <segment> is weights, sampler_weights or "
                "merged_weights",
            )
        run, segment, name, revision = match.groups()
        number = None if revision is None else int(revision)
        return cls(path, run, _TYPES[segment], f"{segment}/{name}", number)

    from_tinker_path = parse

    @property
    def tinker_path(self) -> str:
        """The same as `path`."""
        return self.path


@dataclass(frozen=True, slots=True)
class CheckpointFile(FromMessage):
    """`sha256` is in hexadecimal."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One revision. `path` means the newest one of the name, `revision_path` this one for good.

    `expire_time` is None for what is kept until it is deleted, and for unnamed snapshots, which are
    kept for 24 hours after their last use. `source_path` is what it is a copy of, or was merged
    from. `files` is empty while a snapshot is in the server's memory alone.
    """

    path: str
    revision_path: str
    checkpoint_type: CheckpointType
    training_run_id: str
    create_time: datetime
    expire_time: datetime | None
    size_bytes: int
    base_model: str
    base_fingerprint: str
    lora_config: LoraConfig
    step: int
    metadata: dict[str, str]
    files: list[CheckpointFile]
    source_path: str

    @classmethod
    def from_proto(cls, message: checkpoint_pb2.Checkpoint) -> Self:
        where = f"checkpoint `{message.path}` is of kind"
        return read(
            cls,
            message,
            checkpoint_type=known(checkpoint_pb2.CheckpointKind, message.kind, where),
            expire_time=optional(message, "expire_time", time_of),
            lora_config=LoraConfig.from_proto(message.lora_config),
            files=[CheckpointFile.from_proto(file) for file in message.files],
        )

    # The names of the same in Tinker's SDK.

    @property
    def checkpoint_id(self) -> str:
        """`<segment>/<name>`, as in `sampler_weights/a`."""
        return ParsedCheckpointPath.parse(self.path).checkpoint_id

    @property
    def tinker_path(self) -> str:
        """The same as `path`."""
        return self.path

    @property
    def time(self) -> datetime:
        """The same as `create_time`."""
        return self.create_time

    @property
    def expires_at(self) -> datetime | None:
        """The same as `expire_time`."""
        return self.expire_time

    @property
    def user_metadata(self) -> dict[str, str]:
        """The same as `metadata`."""
        return self.metadata


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a page lies in its list."""

    offset: int
    limit: int
    total_count: int


@dataclass(frozen=True, slots=True)
class CheckpointsListResponse:
    """The newest revision of each name, newest first. Without a cursor: all there are."""

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


@dataclass(frozen=True, slots=True)
class TrainingRunsResponse:
    """Runs, newest first."""

    training_runs: list[TrainingRun]
    cursor: Cursor


@dataclass(frozen=True, slots=True)
class WeightsInfoResponse:
    """What is needed to make a run of the same shape. A `train_*` is whether modules of that group
    are adapted; `lora_config` has their names.
    """

    base_model: str
    is_lora: bool
    lora_rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool
    lora_config: LoraConfig

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "WeightsInfoResponse":
        """What a checkpoint's description says of its weights."""
        groups = {_group(module) for module in checkpoint.lora_config.target_modules}
        return cls(
            base_model=checkpoint.base_model,
            is_lora=checkpoint.checkpoint_type != "merged",
            lora_rank=checkpoint.lora_config.rank,
            train_unembed="unembed" in groups,
            train_mlp="mlp" in groups,
            train_attn="attn" in groups,
            lora_config=checkpoint.lora_config,
        )


@dataclass(frozen=True, slots=True)
class ExportResponse:
    """A merged model, to be downloaded from `path`. `head_untied`: the base model's output head is
    tied to its embedding and this model's is not, since the adapter trains it.
    """

    path: str
    files: list[CheckpointFile]
    checkpoint: Checkpoint
    head_untied: bool

    @classmethod
    def from_proto(cls, message: checkpoint_pb2.ExportCheckpointResponse) -> Self:
        checkpoint = Checkpoint.from_proto(message.checkpoint)
        return cls(message.path, checkpoint.files, checkpoint, message.head_untied)


def _group(module: str) -> str:
    """As the server tells them apart."""
    if module == "lm_head":
        return "unembed"
    parts = module.split(".")
    return "attn" if any("attn" in part or "attention" in part for part in parts) else "mlp"
