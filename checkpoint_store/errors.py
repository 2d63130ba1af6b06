"""What only the store can find wrong."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from mint_core.errors import FailedPrecondition, InvalidRequest, ResourceExhausted

FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointDamaged(FailedPrecondition):
    """The files are not those that were published."""

    reason = "CHECKPOINT_DAMAGED"

    def __init__(self, path: str, file: str, problem: str) -> None:
        super().__init__(
            f"`{file}` of checkpoint `{path}` {problem}; use another revision or save again",
            path=path,
            file=file,
            problem=problem,
        )


class ObjectStoreFailed(FailedPrecondition):
    """The object store refused, or did not answer in time."""

    reason = "OBJECT_STORE_FAILED"

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"the object store of the checkpoints failed: {problem}; the server's log has the "
            "details; try again when it works",
            problem=problem,
        )


class StoreQuotaExceeded(ResourceExhausted):
    """A tenant's checkpoints take all that it may have."""

    reason = "STORE_QUOTA_EXCEEDED"

    def __init__(self, used_bytes: int, quota_bytes: int, size_bytes: int) -> None:
        super().__init__(
            f"your checkpoints take {used_bytes} bytes of the {quota_bytes} that a tenant may have "
            f"in the store, and {size_bytes} more are needed; delete some, or ask for a larger "
            "--store-quota-gib",
            used_bytes=used_bytes,
            quota_bytes=quota_bytes,
            size_bytes=size_bytes,
        )


class WeightsNotFinite(InvalidRequest):
    """NaN or Inf in weights or moments."""

    reason = "WEIGHTS_NOT_FINITE"

    def __init__(self, path: str, tensor: str) -> None:
        super().__init__(
            f"tensor `{tensor}` of checkpoint `{path}` holds NaN or Inf; go back to a "
            "saved state and train with a lower learning rate",
            path=path,
            tensor=tensor,
        )


@contextmanager
def full_disk_told() -> Iterator[None]:
    """Says ResourceExhausted where the store's disk is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # The library in Rust has the number in its text alone.
        told = any(f"os error {number})" in str(error) for number in FULL)
        if not told and getattr(error, "errno", None) not in FULL:
            raise
        raise ResourceExhausted(
            "the checkpoint store has no space left; delete checkpoints, then send the call again"
        ) from error
