"""What calls raise: one root, `MintError`, and classes named for the HTTP status that fits."""

from collections.abc import Mapping


class MintError(Exception):
    """The root: a sentence, a gRPC `code`, a constant `reason`, and what varies as `metadata`.

    `field` is the path of the culprit, such as `data[3].loss_fn_inputs.weights`, or empty.
    """

    code = ""

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        field: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.reason = reason or self.code
        self.metadata: dict[str, str] = dict(metadata or {})
        self.field = field


TinkerError = MintError  # the name under which many scripts catch it


class APIError(MintError):
    """A call failed."""


class APIStatusError(APIError):
    """A server answered with an error; `status_code` is the HTTP status that means the same."""

    status_code = 500


class BadRequestError(APIStatusError):
    """The request can not work as it is, or not in the run's present state."""

    status_code = 400
    code = "INVALID_ARGUMENT"


class InvalidInputError(BadRequestError, ValueError):
    """The client refused the input; nothing was sent."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message, reason="INVALID_REQUEST", field=field)


def refused(field: str, what: str) -> InvalidInputError:
    """The refusal of an input by a sentence that begins with the name of its field."""
    return InvalidInputError(f"`{field}` {what}", field=field)


class AuthenticationError(APIStatusError):
    """The key is missing or wrong."""

    status_code = 401
    code = "UNAUTHENTICATED"


class PermissionDeniedError(APIStatusError):
    """The key does not allow this."""

    status_code = 403
    code = "PERMISSION_DENIED"


class NotFoundError(APIStatusError):
    """What the request names does not exist, or belongs to someone else."""

    status_code = 404
    code = "NOT_FOUND"


class ConflictError(APIStatusError):
    """The name is taken, or another client has taken the run over."""

    status_code = 409
    code = "ABORTED"


class UnprocessableEntityError(APIStatusError):
    """The request was understood and cannot be followed."""

    status_code = 422


class RateLimitError(APIStatusError):
    """Something is full, or the message is too large."""

    status_code = 429
    code = "RESOURCE_EXHAUSTED"


class InternalServerError(APIStatusError):
    """The server is at fault, or (501) lacks what was asked."""

    status_code = 500
    code = "INTERNAL"


class APIConnectionError(APIError):
    """No server answered."""

    code = "UNAVAILABLE"


class APITimeoutError(APIConnectionError, TimeoutError):
    """No answer came in time. A training call goes on nevertheless."""

    code = "DEADLINE_EXCEEDED"


class RequestFailedError(APIError):
    """The call failed in a way that no other class names."""

    code = "UNKNOWN"


class APIResponseValidationError(APIError):
    """The server's answer makes no sense to this client."""

    code = "DATA_LOSS"
