"""Runs quickstart.py against services of its own, on free ports: `make quickstart`. Arguments are
that script's.

Whatever happens, the services end and their store is removed.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).with_name("quickstart.py")
MODEL = SCRIPT.parent.parent / ".models" / "SmolLM2-135M-Instruct"  # `make model` makes it
START_LIMIT_S = 120.0
STOP_LIMIT_S = 30.0


def start(folder: Path) -> "subprocess.Popen[bytes]":
    """Both services, logging into `folder`."""
    ports = [
        f"--{service}-{kind}=127.0.0.1:0"
        for service in ("trainer", "sampler")
        for kind in ("address", "metrics-address")
    ]
    command = [sys.executable, "-m", "mint_core.hosting.serve", *ports]
    command += ["--base-model", str(MODEL), "--base-model-name", MODEL.name]
    command += ["--store", str(folder / "store"), "--ready-file", str(folder / "ready.json")]
    with (folder / "log").open("wb") as log:
        # A session of its own: Ctrl-C reaches this script, which then stops them in order.
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def wait_until_ready(services: "subprocess.Popen[bytes]", folder: Path) -> dict[str, str]:
    """The addresses of trainer and sampler."""
    deadline = time.monotonic() + START_LIMIT_S
    while not (folder / "ready.json").exists():
        if services.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the services did not start:\n{(folder / 'log').read_text()}")
        time.sleep(0.1)
    ready = json.loads((folder / "ready.json").read_text())
    return {service: ready[service]["address"] for service in ("trainer", "sampler")}


def environment(at: dict[str, str]) -> dict[str, str]:
    """This process's, and where the services are; what it says of other servers does not count."""
    return os.environ | {
        "MINT_BASE_URL": at["trainer"],
        "MINT_SAMPLER_URL": at["sampler"],
        "MINT_BASE_MODEL": MODEL.name,
    }


def stop(services: "subprocess.Popen[bytes]") -> None:
    services.terminate()
    try:
        services.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(services.pid, signal.SIGKILL)  # it leads a group: both services and their engines
        services.wait()


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as an exception
    with tempfile.TemporaryDirectory(prefix="mint-quickstart-") as name:
        folder = Path(name)
        services = start(folder)
        try:
            print("starting trainer and sampler", flush=True)
            at = wait_until_ready(services, folder)
            print(f"trainer on {at['trainer']}, sampler on {at['sampler']}", flush=True)
            status = subprocess.run(
                [sys.executable, str(SCRIPT), *sys.argv[1:]], env=environment(at)
            ).returncode
            if status:
                print(f"the services' log ends:\n{(folder / 'log').read_text()[-3000:]}")
            return status
        except KeyboardInterrupt:
            return 130
        finally:
            stop(services)


if __name__ == "__main__":
    sys.exit(main())
