"""Both services under one command, on a tiny model."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import psutil

import mint
from mint import types
from mintrpc.v1 import model_pb2, model_pb2_grpc
from tests.warm import children, started, words_of

LIMIT_S = 120.0
FREE = "127.0.0.1:0"


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "mint_core.hosting.serve", *flags]


@contextmanager
def serving(model: Path, tmp_path: Path) -> Iterator[tuple[Any, dict[str, dict[str, str]]]]:
    ready_file = tmp_path / "ready.json"
    flags = [
        *("--base-model", str(model), "--store", str(tmp_path / "store")),
        *("--trainer-address", FREE, "--sampler-address", FREE),
        *("--trainer-metrics-address", FREE, "--sampler-metrics-address", FREE),
        *("--ready-file", str(ready_file)),
    ]
    with (tmp_path / "log").open("w") as log:
        process = started(command(*flags), stderr=log)
    try:
        deadline = time.monotonic() + LIMIT_S
        while not ready_file.exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        fronts = children(process.pid)
        family = [*fronts, *(engine for front in fronts for engine in children(front.pid))]
        assert len(family) == 4  # two fronts, two engines
        yield process, json.loads(ready_file.read_text())
        _, alive = psutil.wait_procs(family, LIMIT_S)
        assert not alive
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def capabilities(address: str) -> Any:
    with grpc.insecure_channel(address) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        return stub.GetServerCapabilities(model_pb2.GetServerCapabilitiesRequest(), timeout=30)


def test_two_pairs_run_side_by_side_each_in_its_folder(qwen3_folder: Path, tmp_path: Path) -> None:
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
    with serving(qwen3_folder, folders[0]) as one, serving(qwen3_folder, folders[1]) as two:
        ports = {service["address"] for _, pair in (one, two) for service in pair.values()}
        assert len(ports) == 4
        for process, addresses in (one, two):
            trainer, its_sampler = (
                capabilities(addresses[name]["address"]) for name in ("trainer", "sampler")
            )
            assert trainer.role == model_pb2.SERVICE_ROLE_TRAINER
            assert its_sampler.role == model_pb2.SERVICE_ROLE_SAMPLER
            assert trainer.sampler_address == addresses["sampler"]["address"]
            assert trainer.base_models[0].fingerprint == its_sampler.base_models[0].fingerprint
            with mint.ServiceClient(
                base_url=f"http://{addresses['trainer']['address']}"
            ) as service:
                training = service.create_lora_training_client(rank=8)
                sampler = training.save_weights_and_get_sampling_client()
                prompt = types.ModelInput.from_ints([5, 6, 7])
                wish = types.SamplingParams(max_tokens=2)
                assert sampler.sample(prompt, 1, wish).result(LIMIT_S).sequences
            page = urlopen(f"http://{addresses['sampler']['metrics_address']}/metrics").read()
            assert b'mint_memory_limit_bytes{of="kv_cache"}' in page
            process.send_signal(signal.SIGINT)
            assert process.wait(LIMIT_S) == 0
    for folder, (_, addresses) in zip(folders, (one, two), strict=True):
        log = (folder / "log").read_text()
        assert f"connect with MINT_BASE_URL=http://{addresses['trainer']['address']}" in log
        assert "Traceback" not in log
        assert f"store={folder / 'store'}" in log
        assert re.search(r"sampler takes up to .* GiB of memory as it is needed: base .*kv_c", log)
        assert re.search(r"trainer takes up to .*: snapshots .*rows .*passes", log)


def test_make_serve_moves_all_four_ports() -> None:
    words = subprocess.run(
        ["make", "--dry-run", "serve", "PORT=50061"], capture_output=True, text=True, check=True
    ).stdout.split()
    ports = dict(pairwise(words))
    names = ("trainer-address", "sampler-address")
    names += ("trainer-metrics-address", "sampler-metrics-address")
    assert [ports[f"--{name}"] for name in names] == [f"127.0.0.1:{50061 + i}" for i in range(4)]


def test_when_one_service_ends_so_does_the_other(qwen3_folder: Path, tmp_path: Path) -> None:
    with serving(qwen3_folder, tmp_path) as (process, _):
        (sampler,) = (c for c in children(process.pid) if "sampler_service" in words_of(c))
        sampler.kill()
        assert process.wait(LIMIT_S) == 1

    assert "cannot serve: the sampler ended with status -9" in (tmp_path / "log").read_text()


def refusal(*flags: str) -> str:
    done = subprocess.run(command(*flags), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_service_that_cannot_start_ends_both_with_its_reason(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    model = ("--base-model", str(qwen3_folder), "--store", str(tmp_path / "store"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        log = refusal(
            *model,
            *("--trainer-address", FREE, "--sampler-address", f"127.0.0.1:{port}"),
            *("--trainer-metrics-address", FREE, "--sampler-metrics-address", FREE),
        )

    assert f"sampler cannot start: `--address` 127.0.0.1:{port} cannot be listened on" in log
    assert "cannot serve: the sampler ended with status 1; its log says why" in log


def test_a_missing_model_or_a_bad_flag_is_refused(tmp_path: Path) -> None:
    store = ("--store", str(tmp_path / "store"))
    missing = refusal("--base-model", str(tmp_path / "none"), *store)
    assert f"`--base-model` {tmp_path / 'none'} is no folder" in missing

    for flag in ("--colour", "--trainer-colour", "--sampler-colour"):
        (line,) = refusal(flag, "blue", *store).splitlines()
        assert f"Unknown option: {flag}. See --help." in line


def test_help_is_on_standard_output() -> None:
    done = subprocess.run(
        command("--help"), capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    assert done.stdout.startswith("usage: python -m mint_core.hosting.serve")
