"""What does a GPU make of all this? Every part of the list runs by itself: one that fails, hangs or
breaks the device leaves the others alone.

    python -m benchmarks.gpu_checklist [--device cpu] [--out FOLDER] [--limit SECONDS] [PART ...]

With `--device cpu` it is a rehearsal: all sizes are small, figures mean nothing.
"""

import argparse
import gc
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

# What has never run on a GPU first, then in the order of worth; with seconds that each may take.
PARTS = {
    "kernel_tests": 60,
    "pass_tests": 60,
    "recorded": 60,
    "kernel_times": 40,
    "rows_ahead": 50,
    "sampler": 60,
    "ceilings": 30,
    "trainer": 60,
    "sampler_8b": 60,
    "sampler_short": 60,
    "batch_invariant": 60,
    "sampler_mixes": 60,
    "trainer_rate": 60,
    "trainer_8b": 60,
    "float8": 20,
    "adapters": 40,
    "sampler_profile": 60,
    "attention": 50,
    "paged": 40,
    "head": 30,
    "peft": 60,
    "services": 60,
    "recovery": 60,
    "roofline": 40,
}
# Where they are; what needs most of other packages comes last.
MODULES = ("recorded", "kernels", "trainer", "rows", "sampler", "roofline", "services")
STARTING_S = 60  # of a process, beside its first part


def work(parts: Sequence[str], device: str, out: Path) -> None:
    """Runs parts in this process. Leaves with status 3 when the device is broken."""
    import torch

    from benchmarks import gpu_models

    if device == "cpu":
        import tests.interpreted_kernels  # noqa: F401  # mends an interpreter that needs it
    results = out / "checklist.jsonl"
    bench = gpu_models.Bench(torch.device(device), results)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    for part in parts:
        print(f"PART {part}", flush=True)
        started = time.perf_counter()
        try:
            way_of(part)(bench)
            outcome = "done"
        except Exception:
            outcome = traceback.format_exc()
            print(outcome, flush=True)
        seconds = time.perf_counter() - started
        print(f"END {part} {outcome.splitlines()[-1]} {seconds:.1f} s", flush=True)
        result = {"part": part, "device": name, "outcome": outcome, "seconds": seconds}
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        gc.collect()  # what the part held
        if device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                print("the device is broken for this process", flush=True)
                os._exit(3)


def way_of(part: str) -> Callable[..., None]:
    """The function of a part. What other parts need and this one does not may be missing."""
    for name in MODULES:
        module = importlib.import_module(f"benchmarks.gpu_{name}")
        if way := getattr(module, part, None):
            return way  # type: ignore[no-any-return]
    raise LookupError(part)


def supervise(parts: Sequence[str], device: str, out: Path, limit_s: float) -> None:
    """Starts processes until all parts had their turn, or time is up."""
    left, end = list(parts), time.monotonic() + limit_s
    # Kernels run in Triton's interpreter where there is no GPU.
    more = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if device == "cpu" else {}
    while left and time.monotonic() < end:
        command = [sys.executable, "-m", "benchmarks.gpu_checklist", "--worker", "--device", device]
        worker = subprocess.Popen(
            [*command, "--out", str(out), *left],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **more},
            start_new_session=True,
        )
        begun = ""
        due = time.monotonic() + STARTING_S + PARTS[left[0]]
        for line in lines_until(worker, lambda: min(due, end)):  # noqa: B023
            print(line, end="", flush=True)
            if line.startswith("PART "):
                begun = line.split()[1]
                due = time.monotonic() + PARTS[begun]
            elif line.startswith("END "):
                left.remove(line.split()[1])
                due = time.monotonic() + STARTING_S
                begun = ""
        try:
            worker.wait(timeout=0 if time.monotonic() > min(due, end) else 10)
        except subprocess.TimeoutExpired:
            print(f"killed in {begun or 'its start'}: time is up", flush=True)
            worker.kill()
            worker.wait()
        with suppress(ProcessLookupError):  # services and tests that it has left behind
            os.killpg(worker.pid, signal.SIGKILL)
        if begun in left:  # it was killed or died there
            left.remove(begun)
        elif worker.returncode not in (0, 3):
            break
    for part in left:
        print(f"not run: {part}")


def lines_until(worker: "subprocess.Popen[str]", due: object) -> Iterator[str]:
    """The output of a process until it ends, or the time has come."""
    lines: queue.Queue[str | None] = queue.Queue()
    assert worker.stdout is not None
    stream = worker.stdout

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(0.0, due() - time.monotonic()))  # type: ignore[operator]
        except queue.Empty:
            return
        if line is None:
            return
        yield line


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for all parts")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    asked = parser.parse_args()
    parts = asked.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {sorted(unknown)[0]}")
    if asked.worker:
        work(parts, asked.device, asked.out)
    else:
        supervise(parts, asked.device, asked.out, asked.limit)


if __name__ == "__main__":
    main()
