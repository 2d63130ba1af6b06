"""A real S3 server: SeaweedFS, master, volumes, files and S3 gateway in one process."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from checkpoint_store.objects.object_store import ObjectStore, parse_address

BUCKET = "checkpoints"  # made by the first put
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "of-the-store"}
START_LIMIT_S = 60.0
START_TRIES = 3
_PORTS = [f"{part}.port" for part in ("master", "volume", "filer", "s3")]
_PORTS += [f"{port}.grpc" for port in _PORTS]


@dataclass(frozen=True)
class ObjectServer:
    endpoint: str

    def store(self, prefix: str = "") -> str:
        """For a service's `--store`: a prefix of its own unless it is named."""
        return f"s3://{BUCKET}/{prefix or uuid4().hex}?endpoint={self.endpoint}"


@contextmanager
def running_object_server(folder: Path) -> Iterator[ObjectServer]:
    """Runs the server with `CREDENTIALS` in the environment; skips where there is no program."""
    program = Path(sys.executable).with_name("weed")
    if not program.exists():
        pytest.skip("there is no SeaweedFS here: PyPI has it for Linux on x86_64")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        server = ObjectServer(f"http://127.0.0.1:{_start(program, folder, stack)}")
        ObjectStore(parse_address(server.store("made"))).write("made", b"")
        yield server


def _start(program: Path, folder: Path, stack: ExitStack) -> int:
    """Starts the server until the stack ends, and returns its port. It takes ports by number, and
    between our look and its start another process may have taken one: then it ends.
    """
    for _ in range(START_TRIES):
        ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        log = stack.enter_context((folder / "log").open("wb"))
        process = subprocess.Popen(
            [program, "server", *_flags(folder, ports)], stdout=log, stderr=subprocess.STDOUT
        )
        stack.callback(_stop, process, ports)
        if _ready(process, ports["s3.port"], folder / "log"):
            return ports["s3.port"]
    raise AssertionError(f"the server ended at start\n{(folder / 'log').read_text()}")


def _flags(folder: Path, ports: dict[str, int]) -> list[str]:
    keys = {
        "accessKey": CREDENTIALS["AWS_ACCESS_KEY_ID"],
        "secretKey": CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
    }
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "tests", "credentials": [keys], "actions": actions}
    (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
    flags = ["-filer", "-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    flags += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # else at the same ports for each server
    flags += [f"-dir={folder}", f"-s3.config={folder / 'identities.json'}"]
    flags += ["-master.volumeSizeLimitMB=64", "-volume.max=20", "-master.telemetry=false"]
    return flags + [f"-{name}={port}" for name, port in ports.items()]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _ready(process: "subprocess.Popen[bytes]", port: int, log: Path) -> bool:
    """Waits until the port is listened on; False if the process ends before."""
    deadline = time.monotonic() + START_LIMIT_S
    while process.poll() is None:
        assert time.monotonic() < deadline, f"the server did not get ready\n{log.read_text()}"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)  # nothing tells of a port that is listened on
        else:
            return True
    return False


def _stop(process: "subprocess.Popen[bytes]", ports: dict[str, int]) -> None:
    process.kill()  # it takes its time to end otherwise, and its files go anyway
    process.wait()
    for left in Path("/tmp").glob("seaweedfs-*.sock"):
        if any(str(port) in left.name for port in ports.values()):
            left.unlink()
