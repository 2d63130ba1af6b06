"""What happens around every call: access, strict parsing, errors, metrics, one log line."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import Message

from mint_core.errors import MintError, Unimplemented
from mint_core.rpc.access import KeyRing
from mint_core.rpc.caller import CALLER, DEFAULT_TENANT, Caller, caller
from mint_core.rpc.errors import code_of, domain_error, to_status
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.unknown_fields import UnknownField, parse

logger = logging.getLogger("mint.calls")

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any  # grpc.RpcMethodHandler, whose stubs know only servers with threads

# Health and reflection: open to everybody, and not worth a line each time they are asked.
_STANDARD = ("/grpc.health.", "/grpc.reflection.")
_LOGGED_FIELDS = {"training_run_id": "run", "sequence": "sequence"}


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Serves every method of ours, of each of the three kinds that the contract has."""

    def __init__(self, keys: KeyRing | None, metrics: Metrics) -> None:
        self._keys = keys
        self._metrics = metrics
        self._handlers: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        method = handler_call_details.method
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if method.startswith(_STANDARD):
                return handler
            if handler is None:
                return self._refusing(method)
            self._handlers[method] = self._serving(method.rpartition("/")[2], handler)
        return self._handlers[method]

    def _serving(self, method: str, handler: Handler) -> Handler:
        """Returns a handler that takes and parses the request's bytes itself."""
        if handler.request_streaming:
            return self._stream_unary(method, handler)
        if handler.response_streaming:
            return self._unary_stream(method, handler)
        return self._unary_unary(method, handler)

    def _unary_unary(self, method: str, handler: Handler) -> Handler:
        async def serve(raw: bytes, context: Context) -> Any:
            async with self._around(method, context) as call:
                request = call.describe(_read(handler, raw))
                return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(
            serve, response_serializer=_passing_bytes(handler.response_serializer)
        )

    def _unary_stream(self, method: str, handler: Handler) -> Handler:
        async def serve(raw: bytes, context: Context) -> None:
            async with self._around(method, context) as call:
                request = call.describe(parse(handler.request_deserializer, raw))
                # Closed as soon as the caller leaves, not when the generator is collected.
                async with aclosing(handler.unary_stream(request, context)) as responses:
                    async for response in responses:
                        try:
                            await context.write(response)
                        except grpc.aio.InternalError:  # before the word that its reader has left
                            raise asyncio.CancelledError from None

        return handler._replace(request_deserializer=None, unary_stream=serve)

    def _stream_unary(self, method: str, handler: Handler) -> Handler:
        async def serve(raw: AsyncIterator[bytes], context: Context) -> Any:
            async def requests() -> AsyncIterator[Message]:
                async for piece in raw:
                    yield call.describe(parse(handler.request_deserializer, piece))

            async with self._around(method, context) as call:
                return await handler.stream_unary(requests(), context)

        return handler._replace(request_deserializer=None, stream_unary=serve)

    def _refusing(self, method: str) -> Handler:
        async def refuse(raw: AsyncIterator[bytes], context: Context) -> Any:
            async with self._around("unknown", context):
                raise Unimplemented(
                    f"this server has no RPC `{method}`; its version differs from the client's",
                    method=method,
                )

        return grpc.stream_unary_rpc_method_handler(refuse)

    @asynccontextmanager
    async def _around(self, method: str, context: Context) -> AsyncIterator["_Call"]:
        call = _Call(method)
        try:
            tenant = self._keys.tenant_of(_key(context)) if self._keys else DEFAULT_TENANT
            call.caller = Caller(tenant)
            CALLER.set(call.caller)
            yield call
            call.end("OK")
        except asyncio.CancelledError:
            call.end("CANCELLED")  # the caller left, or its deadline passed
            raise
        except Exception as raised:
            error = _domain_error(raised, method)
            call.end(code_of(error).name, error)
            status = to_status(error)
            await context.abort(
                code_of(error),
                status.message,
                (("grpc-status-details-bin", status.SerializeToString()),),
            )
        finally:
            asyncio.get_running_loop().call_soon(self._note, call)  # behind the answer

    def _note(self, call: "_Call") -> None:
        call.log()
        self._metrics.calls.labels(call.method, call.code).inc()
        self._metrics.call_seconds.labels(call.method).observe(call.seconds)


def _passing_bytes(serialize: Callable[[Message], bytes]) -> Callable[[Message | bytes], bytes]:
    """Lets a method answer with a message that is encoded already."""
    return lambda answer: answer if isinstance(answer, bytes) else serialize(answer)


def _read(handler: Handler, raw: bytes) -> Message:
    """Parses a request, leaving the refusal of its content to a method that records it."""
    try:
        return parse(handler.request_deserializer, raw)
    except UnknownField as error:
        if not getattr(handler.unary_unary, "records_refusals", False):
            raise
        caller().refusals.append(error)
        return error.request


class _Call:
    """One call, for its log line."""

    def __init__(self, method: str) -> None:
        self.method = method
        self._start = time.perf_counter()
        self.caller = Caller("-")
        self.code = "UNKNOWN"
        self.seconds = 0.0
        self._error: MintError | None = None

    def describe(self, request: Message) -> Message:
        """Takes what is logged from the request, and returns it."""
        for name, label in _LOGGED_FIELDS.items():
            if name in request.DESCRIPTOR.fields_by_name:
                self.caller.notes[label] = getattr(request, name)
        return request

    def end(self, code: str, error: MintError | None = None) -> None:
        self.code = code
        self.seconds = time.perf_counter() - self._start
        self._error = error

    def log(self) -> None:
        words = {"method": self.method, "tenant": self.caller.tenant, "code": self.code}
        reason = {"reason": self._error.reason} if self._error else {}
        line = {**words, **reason, **self.caller.notes}
        logger.info("%s s=%.4f", " ".join(f"{k}={_word(v)}" for k, v in line.items()), self.seconds)


def _word(value: object) -> str:
    """Returns a value as one word: what callers send must not write lines into the log."""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    text = text[:128]
    return text if text.isprintable() and " " not in text else repr(text)


def _domain_error(error: Exception, method: str) -> MintError:
    if isinstance(error, NotImplementedError):  # a generated servicer's own answer
        return Unimplemented(f"`{method}` is not served by this version", method=method)
    return domain_error(error)


def _key(context: Context) -> str | None:
    metadata = {name: str(value) for name, value in context.invocation_metadata() or ()}
    scheme, _, key = metadata.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key:
        return key.strip()
    return metadata.get("x-api-key")
