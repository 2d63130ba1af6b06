"""What is known of a run: what never changes, what the journal keeps, what callers are shown."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from mint_core.lora.spec import AdapterSpec
from trainer_service.run.gradient import Gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOrigin:
    """What never changes of a run."""

    training_run_id: str
    tenant: str
    number: int  # of creation, ascending; no number is given twice
    base_model: str
    base_fingerprint: str
    spec: AdapterSpec
    trainable_parameter_count: int
    row_bytes: int  # of the weights as they lie in memory
    create_time: datetime
    isolated: bool
    tile_tokens: int  # at which its calls are cut, whatever memory a later engine finds


@dataclass(frozen=True, slots=True)
class RunState:
    """What changes of a run, in the order in which the journal keeps it."""

    step: int = 0
    writer_epoch: int = 1
    acknowledged: int = 0
    gradient: Gradient = field(default_factory=Gradient)
    update_time_s: float = 0.0  # since the epoch
    inexact_replays: int = 0
    inexact_note: str = ""  # of the last of them


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run at one moment, for answers."""

    origin: RunOrigin
    metadata: Mapping[str, str]
    state: RunState
    next_sequence: int
    lost: str  # why; empty while the run can be used
    trouble: str = ""  # what else is wrong; empty: nothing
