"""Domain errors. They know nothing of gRPC: `mint_core.rpc.errors` maps the classes below
`MintError` to statuses.

A subclass of one of those classes narrows it with a `reason` of its own. Errors cross the engine's
pipe, so they pickle.
"""

import copyreg
from collections.abc import Mapping
from typing import Any


class MintError(Exception):
    """What a caller is told: one sentence, a constant `reason`, and what varies in the sentence as
    `metadata`.
    """

    reason = "INTERNAL"

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: Mapping[str, str] = {key: str(value) for key, value in metadata.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        # Without `__init__`, whose arguments are others in each class.
        return copyreg.__newobj__, (type(self), self.message), self.__dict__  # type: ignore[attr-defined]


class InvalidRequest(MintError):
    """The request can never work. `field` is the path of the culprit, such as
    `data[3].loss_fn_inputs.weights`.
    """

    reason = "INVALID_REQUEST"

    def __init__(self, message: str, *, field: str = "", **metadata: object) -> None:
        super().__init__(message, **({"field": field} if field else {}), **metadata)
        self.field = field


class NotFound(MintError):
    """What the request names does not exist, or belongs to another tenant."""

    reason = "NOT_FOUND"


class TrainingRunNotFound(NotFound):
    reason = "TRAINING_RUN_NOT_FOUND"

    def __init__(self, training_run_id: str) -> None:
        super().__init__(
            f"there is no training run `{training_run_id}`; ListTrainingRuns names yours",
            training_run_id=training_run_id,
        )


class BaseModelNotFound(NotFound):
    reason = "BASE_MODEL_NOT_FOUND"

    def __init__(self, base_model: str, served: str) -> None:
        super().__init__(
            f"`base_model` {base_model!r} is not served here; this server serves {served!r}",
            base_model=base_model,
            served=served,
        )


class CheckpointNotFound(NotFound):
    reason = "CHECKPOINT_NOT_FOUND"

    def __init__(self, path: str) -> None:
        super().__init__(f"there is no checkpoint `{path}`", path=path)


class AlreadyExists(MintError):
    """The name or number is taken by something else."""

    reason = "ALREADY_EXISTS"


class FailedPrecondition(MintError):
    """The state must change before this can work."""

    reason = "FAILED_PRECONDITION"


class ResourceExhausted(MintError):
    """Something is full. With `retry_after_s`, the same call may work later and has consumed
    nothing.
    """

    reason = "RESOURCE_EXHAUSTED"

    def __init__(
        self, message: str, *, retry_after_s: float | None = None, **metadata: object
    ) -> None:
        super().__init__(message, **metadata)
        self.retry_after_s = retry_after_s


class Aborted(MintError):
    """The call lost a race; `reason` says which."""

    reason = "ABORTED"


class Unauthenticated(MintError):
    """The key is missing or wrong."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(MintError):
    """The key is good, and not for this."""

    reason = "PERMISSION_DENIED"


class Unavailable(MintError):
    """Try again: nothing was done."""

    reason = "UNAVAILABLE"


class ModelLoading(Unavailable):
    """What the call needs is known once the engine has started for the first time."""

    reason = "MODEL_LOADING"
    retry_after_s = 1.0

    def __init__(self) -> None:
        super().__init__("the base model is still being loaded; send the call again")


class Unimplemented(MintError):
    """A part of the contract that this server lacks."""

    reason = "UNIMPLEMENTED"


class EngineFault(MintError):
    """The engine died or hung while it worked on the call."""

    reason = "ENGINE_FAULT"


class EngineDied(EngineFault):
    """The engine is gone, and with it all that was in its memory; another is starting.

    `at_work`: whether it was at this call, if it does one after the other, and not at one before.
    """

    def __init__(self, message: str, *, at_work: bool = True) -> None:
        super().__init__(message)
        self.at_work = at_work
