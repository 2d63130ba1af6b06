"""A small engine: it answers what it is told, and breaks on request. `python -m tests.engines.echo
FD`.
"""

from dataclasses import dataclass
from pathlib import Path

from mint_core.engine_host.carried import NO_FILES, JobFiles
from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import ResourceExhausted

MODEL = ModelDescription(
    name="echo",
    folder=".",
    context_length=128,
    vocabulary_size=64,
    max_lora_rank=8,
    fingerprint="00",
    dtype="float32",
    device="cpu",
    eos_token_ids=(2,),
    bitwise_reproducible=True,
    text_only=True,
    linear_modules=("q_proj",),
    memory_bytes=0,
)


@dataclass(frozen=True, slots=True)
class EchoConfig:
    folder: str = "."  # of the model
    refusal: str = ""  # why the engine does not start; empty: it does
    failing_starts: tuple[int, ...] = ()  # with a start log, only these, from 1
    hangs_at_starts: tuple[int, ...] = ()  # of the start log: it loads for ever
    start_s: float = 0.0
    start_log: Path | None = None  # gets a line per start


@dataclass(frozen=True, slots=True)
class Echo:
    """Answer: the text."""

    text: str


@dataclass(frozen=True, slots=True)
class Copy:
    """Writes a file anew under another name, `times` over. Answer: where the engine has the
    first.
    """

    source: Path
    target: Path
    times: int = 1


def copied_files(job: object) -> JobFiles:
    """What a job reads and writes."""
    if not isinstance(job, Copy):
        return NO_FILES
    return JobFiles((str(job.source),), (str(job.target),), lambda error: ResourceExhausted("full"))


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer: InvalidRequest with the text."""

    text: str


@dataclass(frozen=True, slots=True)
class Bug:
    """Raises what is no domain error."""


@dataclass(frozen=True, slots=True)
class Crash:
    """Ends the process in the middle of the call."""

    exit_code: int


@dataclass(frozen=True, slots=True)
class Hang:
    """Says nothing any more."""


@dataclass(frozen=True, slots=True)
class Work:
    """Answers "done" after heartbeats."""

    heartbeats: int
    interval_s: float


@dataclass(frozen=True, slots=True)
class Count:
    """Sends the numbers below `parts` one by one, bundled `bundle` at a time. Answer: "done"."""

    parts: int
    bundle: int = 1


@dataclass(frozen=True, slots=True)
class Aside:
    """Sends "copied" as a part; its answer never comes, and the engine goes on."""


Job = Aside | Echo | Refuse | Bug | Crash | Hang | Work | Count
