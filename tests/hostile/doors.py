"""What comes before a call: headers that no client sends, and connections that are no client's."""

import random
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

from tests.hostile.attacks import Code, Hostile

LIMIT_S = 1.0  # for an answer, which some never get
CALL_LIMIT_S = 60.0
SOFT_BYTES = 7_000  # of metadata, beyond which gRPC itself refuses some calls, and in the end all
METHOD = "/mintrpc.v1.TrainerService/ListTrainingRuns"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
_NAMES = ("x-api-key", "authorization", "x-api-key-bin", "authorization-bin", "cookie", "x-a")
Header = tuple[str, str | bytes]


def keys(hostile: Hostile, seed: int, count: int) -> Counter[str]:
    """Sends calls with headers of every kind. Raises AssertionError where one is let in that does
    not carry the key alone, or is refused that does. Returns how often each code came.
    """
    draw, codes = random.Random(seed), Counter[str]()
    call = hostile.trainer.unary_unary(METHOD)
    for _ in range(count):
        metadata = _metadata(draw, hostile.key)
        expected = frozenset({Code.OK if _key(metadata) == {hostile.key} else Code.UNAUTHENTICATED})
        if sum(32 + len(name) + len(value) for name, value in metadata) > SOFT_BYTES:
            expected |= {Code.RESOURCE_EXHAUSTED}
        try:
            call(b"", metadata=metadata, timeout=CALL_LIMIT_S)
            code = Code.OK
        except grpc.RpcError as error:
            code = error.code()
            if code is Code.INTERNAL and "metadata" in str(error.details()):  # it is no header
                codes["NOT SENT"] += 1
                continue
        assert code in expected, f"{code} was the answer to {metadata}"
        codes[code.name] += 1
    return codes


def _key(metadata: Sequence[Header]) -> set[str]:
    """The keys that a call carries."""
    bearers = [str(v)[7:] for n, v in metadata if n == "authorization" and str(v)[:7] in _BEARER]
    plain = [str(value) for name, value in metadata if name == "x-api-key"]
    return {key.strip() for key in (*bearers, *plain)} - {""}


_BEARER = ("Bearer ", "bearer ", "BEARER ")


def _metadata(draw: random.Random, key: str) -> list[Header]:
    values = (key, key[:-1], key * 2, "", " ", f" {key} ", "x" * 3000, "x" * 20_000, "é", "a\nb")
    found: list[Header] = []
    for _ in range(draw.randrange(1, 4)):
        name, value = draw.choice(_NAMES), draw.choice(values)
        if draw.random() < 0.5:
            value = draw.choice((*_BEARER, "Bearer  ", "Basic ", "Bearer")) + value
        odd = draw.randbytes(draw.randrange(64)) if name.endswith("-bin") else value
        found.append((name, odd))
    many = draw.choice((0, 0, 0, 0, 50, 1000))
    return found + [(f"x-{i}", "y") for i in range(many)] + found * draw.randrange(2)


@dataclass(frozen=True, slots=True)
class Port:
    """One that speaks TLS and asks for certificates. `pairs`: of clients, by what they are."""

    number: int
    authority: Path
    pairs: dict[str, tuple[Path, Path]]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.number), LIMIT_S)

    def context(self, whose: str = "good") -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.authority)
        context.set_alpn_protocols(["h2"])
        if whose in self.pairs:
            context.load_cert_chain(*self.pairs[whose])
        return context

    def secured(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        return context.wrap_socket(self.connect(), server_hostname="localhost")

    def hello(self) -> bytes:
        """What a client says first."""
        theirs = ssl.MemoryBIO()
        client = self.context().wrap_bio(ssl.MemoryBIO(), theirs, server_hostname="localhost")
        with suppress(ssl.SSLWantReadError):
            client.do_handshake()
        return theirs.read()


def knocks(port: Port, seed: int, count: int) -> Counter[str]:
    """Comes to the port in every wrong way, and in the right one to say what no client says.
    Returns how often each way ended in an answer by HTTP/2.
    """
    draw, answered = random.Random(seed), Counter[str]()
    for _ in range(count):
        way = draw.choice(_WAYS)
        with suppress(OSError):  # which is how a server refuses
            answered[way.__name__.strip("_")] += way(port, draw)
    return answered


def _bytes(port: Port, draw: random.Random) -> bool:
    return _said(port.connect(), draw.randbytes(draw.randrange(2000)))


def _plaintext(port: Port, draw: random.Random) -> bool:
    http_1 = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    return _said(port.connect(), draw.choice((http_1, PREFACE + call(), PREFACE)))


def _half_a_hello(port: Port, draw: random.Random) -> bool:
    hello = port.hello()
    return _said(port.connect(), hello[: draw.randrange(len(hello))])


def _damaged_hello(port: Port, draw: random.Random) -> bool:
    return _said(port.connect(), _damaged(port.hello(), draw))


def _certificate(port: Port, draw: random.Random) -> bool:
    """Not ours, or none."""
    whose = draw.choice([name for name in ("none", *port.pairs) if name != "good"])
    return _said(port.secured(port.context(whose)), PREFACE + call())


def _version(port: Port, draw: random.Random) -> bool:
    context = port.context()
    if draw.random() < 0.5:
        context.set_alpn_protocols(["http/1.1", "spdy/3"])
    else:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    return _said(port.secured(context), PREFACE + call())


def _conversation(port: Port, draw: random.Random) -> bool:
    said, connection = draw.choice(_CONVERSATIONS)(draw), port.secured(port.context())
    if draw.random() < 0.8:
        return _said(connection, said)
    with connection:
        connection.sendall(said[: draw.randrange(len(said))])
    return False


_WAYS: tuple[Callable[[Port, random.Random], bool], ...] = (
    _bytes,
    _plaintext,
    _half_a_hello,
    _damaged_hello,
    _certificate,
    _version,
    *[_conversation] * 6,
)


def _said(connection: socket.socket, content: bytes) -> bool:
    """Says it, and nothing more. Whether a call was answered."""
    with connection:
        connection.sendall(content)
        if not isinstance(connection, ssl.SSLSocket):
            connection.shutdown(socket.SHUT_WR)
        return HEADERS in _frames(connection)


def _frames(connection: socket.socket) -> set[int]:
    """The kinds of frames that come until a call has ended, or the connection."""
    found, buffer = set[int](), b""
    while not found & {HEADERS, RESET, GOAWAY}:
        received = connection.recv(65_536)
        if not received:
            break
        buffer += received
        while len(buffer) >= 9 + (size := int.from_bytes(buffer[:3])):
            found.add(buffer[3])
            buffer = buffer[9 + size :]
    return found


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def header(name: bytes, value: bytes) -> bytes:
    """In HPACK, written out and not remembered."""
    return b"\0" + _text(name) + _text(value)


def _text(content: bytes) -> bytes:
    size = len(content)
    if size < 127:
        return bytes((size,)) + content
    size, length = size - 127, b"\x7f"
    while size >= 128:
        size, length = size >> 7, length + bytes((size & 127 | 128,))
    return length + bytes((size,)) + content


PSEUDO = (
    (b":method", b"POST"),
    (b":scheme", b"https"),
    (b":path", METHOD.encode()),
    (b":authority", b"localhost"),
)
USUAL = ((b"content-type", b"application/grpc"), (b"te", b"trailers"))
END_STREAM, END_HEADERS = 1, 4


def call(
    *extra: tuple[bytes, bytes],
    stream: int = 1,
    usual: Sequence[tuple[bytes, bytes]] = (*PSEUDO, *USUAL),
) -> bytes:
    """A call without a message, and what comes before it."""
    block = b"".join(header(*each) for each in (*usual, *extra))
    return frame(SETTINGS) + _block(block, stream) + frame(DATA, bytes(5), END_STREAM, stream)


def _block(block: bytes, stream: int) -> bytes:
    pieces = [block[at : at + 16_000] for at in range(0, len(block), 16_000)] or [b""]
    kinds = [HEADERS, *[CONTINUATION] * (len(pieces) - 1)]
    flags = [*[0] * (len(pieces) - 1), END_HEADERS]
    parts = zip(kinds, pieces, flags, strict=True)
    return b"".join(frame(kind, piece, flag, stream) for kind, piece, flag in parts)


def _odd_headers(draw: random.Random) -> bytes:
    names = (b"x-api-key", b"authorization", b"X-API-KEY", b"", b"a b", b":path", b"\xff", b"te")
    values = (b"", b"\0", b"\xff\xfe", b"Bearer \xc3\xa9", b"a\r\nb: c", draw.randbytes(40))
    long = (b"x" * 9000, b"x" * 70_000)
    entries = []
    for _ in range(draw.randrange(1, 5)):
        value = draw.choice(values) if draw.random() < 0.9 else draw.choice(long)
        entries.append((draw.choice(names), value))
    usual = [each for each in (*PSEUDO, *USUAL) if draw.random() < 0.95]
    draw.shuffle(entries)
    return PREFACE + call(*entries, usual=usual)


def _odd_frames(draw: random.Random) -> bytes:
    frames = [
        frame(
            draw.randrange(12), draw.randbytes(draw.randrange(40)), draw.randrange(256),
            draw.choice((0, 1, 2, 3, 2**31 - 1)),
        )
        for _ in range(draw.randrange(1, 6))
    ]  # fmt: skip
    return PREFACE + frame(SETTINGS) + b"".join(frames) + call(stream=5)


def _flood(draw: random.Random) -> bytes:
    opened = b"".join(header(*each) for each in (*PSEUDO, *USUAL))
    streams = range(1, 601, 2)
    resets = [
        frame(HEADERS, opened, END_HEADERS, stream) + frame(RESET, bytes(4), 0, stream)
        for stream in streams
    ]
    endless = frame(HEADERS, opened, 0, 1) + frame(CONTINUATION, header(b"a", b"b"), 0, 1) * 2000
    pieces = (
        frame(PING, bytes(8)) * 2000,
        frame(SETTINGS, bytes(2) + bytes(4)) * 2000,
        b"".join(resets),
        endless,
    )
    return PREFACE + frame(SETTINGS) + draw.choice(pieces) + call(stream=1001)


def _damaged_call(draw: random.Random) -> bytes:
    return PREFACE + frame(SETTINGS) + _damaged(call((b"x-api-key", b"sk-mint-none")), draw)


def _damaged(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randrange(1, 9)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


_CONVERSATIONS = (_odd_headers, _odd_headers, _odd_frames, _flood, _damaged_call)


@contextmanager
def half_open(port: Port, count: int) -> Iterator[None]:
    """Holds so many connections that do not get on: silent, in the middle of a handshake, behind
    it, and behind HTTP/2's.
    """
    hello = port.hello()
    said = (b"", hello[: len(hello) // 2], hello)
    with ExitStack() as held:
        for number in range(count):
            if number % 5 < len(said):
                connection = held.enter_context(port.connect())
                connection.sendall(said[number % 5])
            else:
                secured = held.enter_context(port.secured(port.context()))
                secured.sendall(PREFACE[: len(PREFACE) // (number % 2 + 1)])
        yield
