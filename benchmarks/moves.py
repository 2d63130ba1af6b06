"""What a move costs its user, and a drain its neighbours: a group of many runs is drained while
eight tenants train, over gRPC with a tiny model.

`python -m benchmarks.moves [--runs 1000]`. Idle runs have taken a step each. A tenant's pause is
what the longest of its steps around the drain takes beyond its usual one before it.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc
import numpy as np

import mint
from benchmarks.trainer_fairness import some, step_s
from mintrpc.v1 import admin_pb2, admin_pb2_grpc
from tests.models import tiny_qwen3
from tests.servers import running_trainer

TENANTS, TOKENS, WARM_UP_S, LATER_S = 8, 512, 15.0, 5.0


class Tenant(threading.Thread):
    """Takes steps until it is stopped, and notes when and how long."""

    def __init__(self, run: mint.TrainingClient, seed: int, stopped: threading.Event) -> None:
        super().__init__()
        self.run_client, self.stopped = run, stopped
        self.batch = some(TOKENS, seed)
        self.steps: list[tuple[float, float]] = []  # begun at, seconds

    def run(self) -> None:
        while not self.stopped.is_set():
            begun = time.monotonic()
            self.steps.append((begun, step_s(self.run_client, self.batch)))


def drain(admin: admin_pb2_grpc.AdminServiceStub, name: str) -> float:
    """Seconds until the group is gone."""
    started = time.monotonic()
    admin.DrainGroup(admin_pb2.DrainGroupRequest(name=name))
    while any(g.name == name for g in admin.ListGroups(admin_pb2.ListGroupsRequest()).groups):
        time.sleep(0.05)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=32)
    options = parser.parse_args()
    stopped = threading.Event()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_trainer(tiny_qwen3(Path(folder) / "model"), Path(folder) / "store") as service,
        mint.ServiceClient(base_url=service.address) as client,
        grpc.insecure_channel(service.address) as channel,
    ):
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        idle = [client.create_lora_training_client(rank=options.rank) for _ in range(options.runs)]
        batch = some(128, 0)
        for first in range(0, len(idle), 64):
            steps = [(run.forward_backward(batch), run.optim_step()) for run in idle[first:][:64]]
            for _, step in steps:
                step.result()
        runs = [client.create_lora_training_client(rank=options.rank) for _ in range(TENANTS)]
        tenants = [Tenant(run, seed, stopped) for seed, run in enumerate(runs)]
        for tenant in tenants:
            tenant.start()
        admin.AddGroup(admin_pb2.AddGroupRequest())
        time.sleep(WARM_UP_S)
        began = time.monotonic()
        elapsed_s = drain(admin, "group-0")
        ended = time.monotonic()
        time.sleep(LATER_S)
        stopped.set()
        for tenant in tenants:
            tenant.join()
        row_bytes = max(size.stat().st_size for size in Path(folder).rglob("run-*.safetensors"))
    before = [s for t in tenants for at, s in t.steps if began - WARM_UP_S / 2 < at < began - 1]
    during = [s for t in tenants for at, s in t.steps if began - 1 <= at <= ended]
    longest = [max(s for at, s in t.steps if began - 1 <= at <= ended + 1) for t in tenants]
    row = {
        "runs": options.runs + TENANTS,
        "row_mib": round(row_bytes / 2**20, 2),
        "drain_s": round(elapsed_s, 1),
        "step_s_before": round(float(np.median(before)), 3),
        "step_s_during": round(float(np.median(during)), 3),
        "longest_step_s_before": round(max(before), 3),
        "pause_s_of_each_tenant": sorted(round(s - float(np.median(before)), 2) for s in longest),
    }
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
