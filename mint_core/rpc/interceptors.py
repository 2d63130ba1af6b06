"""What happens around every call: access, quotas, strict parsing, errors, metrics, one log line."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message

from mint_core.access.audit import AuditLog
from mint_core.access.door import Door
from mint_core.access.scopes import changes, scope_of
from mint_core.errors import (
    InvalidRequest,
    MintError,
    ModelLoading,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from mint_core.rpc.caller import CALLER, Caller, parsed
from mint_core.rpc.errors import code_of, domain_error, to_status, trailers
from mint_core.rpc.garbage import Garbage
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.parsing import NotTaken, parse
from mint_core.rpc.quotas import Account, QuotaBook, QuotaExceeded
from mint_core.turns import Workers

logger = logging.getLogger("mint.calls")

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any  # grpc.RpcMethodHandler, whose stubs know only servers with threads

# Health and reflection: open to everybody, and not worth a line each time they are asked.
_STANDARD = ("/grpc.health.", "/grpc.reflection.")
PARSERS = 2  # threads, which share the interpreter
CHECK_S = 1.0  # between two looks at the files of keys and certificates
EXPIRY_CHECK_S = 60.0  # between two looks at whether one has expired meanwhile
HOLD_S = 15.0  # a call, while the model is loaded: less than clients wait for a first word
BODY_S = 600.0  # from the beginning of a call to the end of its request
_LOGGED_FIELDS = {"training_run_id": "run", "sequence": "sequence"}
_AUDITED_FIELDS = ("path", "name", "request_id", "key_id", "device")  # beside these
_AUDITED_CHARACTERS = 256


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Serves every method of ours, of each of the three kinds that the contract has."""

    def __init__(
        self, door: Door, metrics: Metrics, quotas: QuotaBook, audit: AuditLog | None = None
    ) -> None:
        self._door = door
        self._audit = audit
        self.begun = asyncio.Event()  # the model is loaded
        self._open: set[_Call] = set()
        self._metrics = metrics
        self._handlers: dict[str, Handler] = {}
        self._parsers = Workers(PARSERS, "parsing")
        self._garbage = Garbage()
        account = partial(Account, quotas, remedy="wait until some have ended", passes=True)
        self._calls = account("calls", "calls under way")
        self._streams = account("streams", "streams under way")
        self._bytes = account("request_mib", "MiB of requests under way", unit=2**20)

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
            self._handlers[method] = self._serving(method, handler)
        return self._handlers[method]

    async def keep_checking(self) -> None:
        """Ends the calls of those whose keys or certificates are good no more, and calls whose
        request does not come.
        """
        version, checked_s = self._door.version(), time.monotonic()
        while True:
            await asyncio.sleep(CHECK_S)
            overdue = time.monotonic() - checked_s > EXPIRY_CHECK_S
            if (now := self._door.version()) != version or overdue:
                version, checked_s = now, time.monotonic()
                for call in list(self._open):
                    self._check(call)
            for call in list(self._open):
                if time.monotonic() > call.due_s:
                    call.revoke(Unavailable(f"the request has not come within {BODY_S:g} s"))

    def _check(self, call: "_Call") -> None:
        try:
            if self._door.admit(call.context, scope_of(call.path)).tenant != call.caller.tenant:
                raise Unauthenticated("the key or certificate is another tenant's now; call again")
        except (Unauthenticated, PermissionDenied) as error:
            call.revoke(error)

    def _serving(self, method: str, handler: Handler) -> Handler:
        """Returns a handler that takes and parses the request's bytes itself."""
        if handler.request_streaming:
            return self._stream_unary(method, handler)
        if handler.response_streaming:
            return self._unary_stream(method, handler)
        return self._unary_unary(method, handler)

    def _unary_unary(self, method: str, handler: Handler) -> Handler:
        async def serve(_: object, context: Context) -> Any:
            async with self._around(method, context) as call:
                if self.begun.is_set():  # then nothing keeps the bytes once they are parsed
                    request = await _parsed(handler, await self._read(context, call), call)
                    return await handler.unary_unary(request, context)
                try:
                    raw = await self._read(context, call)
                except QuotaExceeded:  # so much cannot be held, and soon need not be
                    raise ModelLoading from None
                try:
                    return await handler.unary_unary(await _parsed(handler, raw, call), context)
                except ModelLoading:
                    pass  # and nothing of it is kept but the bytes that came
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.begun.wait(), HOLD_S)
                call.caller.refusals.clear()
                return await handler.unary_unary(await _parsed(handler, raw, call), context)

        # As if the request were a stream: then this is called before the body is taken in.
        return grpc.stream_unary_rpc_method_handler(
            serve, response_serializer=_passing_bytes(handler.response_serializer)
        )

    def _unary_stream(self, method: str, handler: Handler) -> Handler:
        async def serve(_: object, context: Context) -> None:
            async with self._around(method, context, self._streams) as call:
                request = await _parsed(handler, await self._read(context, call), call)
                # Closed as soon as the caller leaves, not when the generator is collected.
                async with aclosing(handler.unary_stream(request, context)) as responses:
                    async for response in responses:
                        try:
                            await context.write(response)
                        except grpc.aio.InternalError:  # before the word that its reader has left
                            raise asyncio.CancelledError from None

        return grpc.stream_stream_rpc_method_handler(
            serve, response_serializer=handler.response_serializer
        )

    def _stream_unary(self, method: str, handler: Handler) -> Handler:
        async def serve(raw: AsyncIterator[bytes], context: Context) -> Any:
            async def requests() -> AsyncIterator[Message]:
                async for piece in raw:
                    call.caller.request_bytes = max(call.caller.request_bytes, len(piece))
                    with self._bytes.holding(call.caller.tenant, len(piece)):
                        deserialize = handler.request_deserializer
                        yield call.describe(await parsed(parse, deserialize, piece))

            async with self._around(method, context, self._streams) as call:
                return await handler.stream_unary(requests(), context)

        return handler._replace(request_deserializer=None, stream_unary=serve)

    def _refusing(self, method: str) -> Handler:
        async def refuse(_: object, context: Context) -> Any:
            async with self._around("", context):
                raise Unimplemented(
                    f"this server has no RPC `{method}`; its version differs from the client's",
                    method=method,
                )

        return grpc.stream_unary_rpc_method_handler(refuse)

    async def _read(self, context: Context, call: "_Call") -> bytes:
        """Takes a request in, against the tenant's quota."""
        call.due_s = time.monotonic() + BODY_S
        raw = await context.read()
        call.due_s = math.inf
        if raw is grpc.aio.EOF:
            raise InvalidRequest("the call has no message; use a client of the server's version")
        call.caller.request_bytes = len(raw)
        call.resources.enter_context(self._bytes.holding(call.caller.tenant, len(raw)))
        return bytes(raw)

    @asynccontextmanager
    async def _around(
        self, method: str, context: Context, *accounts: Account
    ) -> AsyncIterator["_Call"]:
        call = _Call(method, context)
        try:
            guest = self._door.admit(context, scope_of(method))
            tenant = guest.tenant
            call.caller = Caller(tenant, guest.key_id, guest.scopes, self._parsers)
            CALLER.set(call.caller)
            self._open.add(call)
            with call.resources:
                for account in (self._calls, *accounts):
                    call.resources.enter_context(account.holding(tenant, 1))
                yield call
            call.end("OK")
        except asyncio.CancelledError:
            if call.revoked is None:
                call.end("CANCELLED")  # the caller left, or its deadline passed
                raise
            call.task.uncancel()
            await call.refuse(call.revoked)
        except Exception as raised:
            await call.refuse(_domain_error(raised, call.method))
        finally:
            self._open.discard(call)
            call.caller.refusals.clear()
            asyncio.get_running_loop().call_soon(self._note, call)  # behind the answer

    def _note(self, call: "_Call") -> None:
        call.log()
        if call.code != "OK":
            self._garbage.left(call.caller.request_bytes)
        if self._audit is not None and changes(call.path):
            self._audit.note(**call.record())
        self._metrics.calls.labels(call.method, call.code).inc()
        self._metrics.call_seconds.labels(call.method).observe(call.seconds)


async def _parsed(handler: Handler, raw: bytes, call: "_Call") -> Message:
    """Leaves the refusal of its content to a method that records it."""
    try:
        return call.describe(await parsed(parse, handler.request_deserializer, raw))
    except NotTaken as error:
        if not getattr(handler.unary_unary, "records_refusals", False):
            raise
        call.caller.refusals.append(error.with_traceback(None))  # which holds the request
        return call.describe(error.request)


def _passing_bytes(serialize: Callable[[Message], bytes]) -> Callable[[Message | bytes], bytes]:
    """Lets a method answer with a message that is encoded already."""
    return lambda answer: answer if isinstance(answer, bytes) else serialize(answer)


class _Call:
    """One call, while it is under way, and for its log line."""

    def __init__(self, path: str, context: Context) -> None:
        self.path = path
        self.method = path.rpartition("/")[2] or "unknown"
        self.context = context
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.revoked: MintError | None = None  # why it must end
        self._start = time.perf_counter()
        self.caller = Caller("-")
        self.resources = ExitStack()  # that it holds while it is under way
        self.due_s = math.inf  # when its request must have come
        self.what: dict[str, object] = {}  # for the audit log
        self.code = "UNKNOWN"
        self.seconds = 0.0
        self._error: MintError | None = None

    def describe(self, request: Message) -> Message:
        """Takes what is logged from the request, and returns it."""
        for name, label in _LOGGED_FIELDS.items():
            if name in request.DESCRIPTOR.fields_by_name:
                self.caller.notes[label] = getattr(request, name)
        for name in _AUDITED_FIELDS:
            if name in request.DESCRIPTOR.fields_by_name:
                self.what[name] = getattr(request, name)[:_AUDITED_CHARACTERS]
        return request

    def revoke(self, error: MintError) -> None:
        """Ends the call, whose caller may no longer make it. What was accepted of it goes on."""
        if self.revoked is None:
            self.revoked = error
            self.task.cancel()

    async def refuse(self, error: MintError) -> None:
        """Answers with an error."""
        error.with_traceback(None)  # which holds the request
        self.end(code_of(error).name, error)
        status = to_status(error)
        await self.context.abort(
            code_of(error),
            status.message,
            trailers(error, status),
        )

    def end(self, code: str, error: MintError | None = None) -> None:
        self.code = code
        self.seconds = time.perf_counter() - self._start
        self._error = error

    def record(self) -> dict[str, object]:
        """What the audit log says of it."""
        caller = self.caller
        names = {"key": caller.key_id} if caller.key_id else {}
        reason = {"reason": self._error.reason} if self._error else {}
        who = {"tenant": caller.tenant, **names, "peer": self.context.peer()}
        what = {"method": self.method, **self.what, **caller.notes}
        return {**who, **what, "code": self.code, **reason}

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
