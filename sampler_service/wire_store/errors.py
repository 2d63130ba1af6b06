"""Why a trainer does not give what a sampler asks for."""

import grpc

from checkpoint_store.errors import CheckpointDamaged
from mint_core.errors import CheckpointNotFound, FailedPrecondition, MintError, Unavailable
from mint_core.rpc.errors import Recorded

_DETAILS = "grpc-status-details-bin"
# What is not the network's: it will be the same when it is asked again.
_REFUSALS = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.FAILED_PRECONDITION,
)


class StoreUnreachable(Unavailable):
    """The trainer does not answer now."""

    reason = "STORE_UNREACHABLE"
    retry_after_s = 1.0

    def __init__(self, address: str, problem: str) -> None:
        super().__init__(
            f"the trainer at {address}, which has the adapters, does not answer: {problem}; send "
            "the call again",
            address=address,
            problem=problem,
        )


class StoreRefused(FailedPrecondition):
    """The trainer does not let this sampler in, or is none."""

    reason = "STORE_REFUSED"

    def __init__(self, address: str, problem: str) -> None:
        super().__init__(
            f"this sampler gets no adapters from the trainer at {address}: {problem}",
            address=address,
            problem=problem,
        )


def error_of(failure: grpc.RpcError, address: str, path: str) -> MintError:
    """What a sampler's caller is told of a call that failed."""
    code, told = failure.code(), _told(failure)
    if told is not None and told.reason == CheckpointNotFound.reason:
        return CheckpointNotFound(path)
    if told is not None and told.reason == CheckpointDamaged.reason:
        return CheckpointDamaged(path, *(told.metadata.get(key, "") for key in ("file", "problem")))
    problem = told.message if told else str(failure.details() or code.name)
    if code in _REFUSALS:
        return StoreRefused(address, f"{problem} ({_remedy(code)})")
    return StoreUnreachable(address, problem)


def _remedy(code: grpc.StatusCode) -> str:
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return "--store-api-key names the file of this sampler's key"
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return "the trainer's log has the details"
    return "--store must name a trainer of this version or a newer one"


def _told(failure: grpc.RpcError) -> Recorded | None:
    """The trainer's own word; None: somebody in between has spoken, or gRPC."""
    trailers: dict[str, bytes] = dict(failure.trailing_metadata() or ())  # type: ignore[arg-type]  # they unpack
    return Recorded(trailers[_DETAILS]) if _DETAILS in trailers else None
