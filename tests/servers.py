"""Real services as processes of their own, on ports that the kernel chose."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.warm import started

START_LIMIT_S = 120.0
STOP_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class RunningService:
    """A service that answers."""

    address: str
    metrics_address: str
    process: "subprocess.Popen[bytes]"
    log: Path  # what it wrote to standard error

    def log_text(self) -> str:
        """With the lines of every call that has been answered: they come behind the answers."""
        with grpc.insecure_channel(self.address) as channel, suppress(grpc.RpcError):
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        return self.log.read_text(errors="replace")  # gRPC's core cuts texts between bytes


@contextmanager
def running_trainer(model: Path, store: Path | str, **flags: object) -> Iterator[RunningService]:
    """Runs `python -m trainer_service`; `flags` are those of its --help, such as `threads=1`."""
    with _running("trainer_service", model, store, flags) as service:
        yield service


@contextmanager
def running_summing_trainer(folder: Path, **flags: object) -> Iterator[RunningService]:
    """Runs a trainer on the engine of sums, which starts fast: see tests.engines.rows."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    with _running("tests.engines.rows_service", model, folder / "store", flags) as service:
        yield service


@contextmanager
def running_sampler(model: Path, store: Path | str, **flags: object) -> Iterator[RunningService]:
    """Runs `python -m sampler_service`; `flags` are those of its --help."""
    with _running("sampler_service", model, store, flags) as service:
        yield service


@contextmanager
def _running(
    module: str, model: Path, store: Path | str, flags: dict[str, object]
) -> Iterator[RunningService]:
    with TemporaryDirectory(prefix="mint-service-") as folder:
        ready_file, log = Path(folder, "ready.json"), Path(folder, "log")
        settings = {
            "base_model": model,
            "store": store,
            "address": "127.0.0.1:0",
            "metrics_address": "127.0.0.1:0",
            "device": "cpu",
            **flags,
            "ready_file": ready_file,
        }
        with log.open("wb") as errors:
            process = started([sys.executable, "-m", module, *arguments(settings)], stderr=errors)
        try:
            addresses = _await_ready(process, ready_file, log)
            yield RunningService(**addresses, process=process, log=log)
        finally:
            stop(process)


def arguments(settings: dict[str, object]) -> list[str]:
    arguments = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag[2:]}")
        else:
            arguments.append(f"{flag}={value}")
    return arguments


def _await_ready(process: "subprocess.Popen[bytes]", ready_file: Path, log: Path) -> dict[str, str]:
    deadline = time.monotonic() + START_LIMIT_S
    while not ready_file.exists():  # renamed into place, so whole
        assert process.poll() is None, f"the service ended at start\n{log.read_text()}"
        assert time.monotonic() < deadline, f"the service did not get ready\n{log.read_text()}"
        time.sleep(0.05)  # nothing tells of a file's appearance
    addresses: dict[str, str] = json.loads(ready_file.read_text())
    return addresses


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Ends a service as Ctrl-C does, or by force if that does not help."""
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
