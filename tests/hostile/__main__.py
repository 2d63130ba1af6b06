"""`python -m tests.hostile MINUTES`: a neighbour beside an honest tenant, then a hostile one.

What must hold is asserted; how long things took is printed.
"""

import json
import logging
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mintrpc.v1 import model_pb2
from tests.hostile.attacks import ATTACKS, Hostile
from tests.hostile.stage import Stage, staged
from tests.models import tiny_qwen3

logger = logging.getLogger("hostile")

SIZE_MIB = 64
ATTACKERS = 3
QUIET_S = 5.0  # what stays after it has been left behind; nothing tells when the rest is gone
Times = dict[str, list[float]]


def hour(stage: Stage, busy: Callable[[threading.Event], None], seconds: float) -> Times:
    """The neighbour's work beside another's, and the answers of GetServerCapabilities."""
    times: Times = defaultdict(list)
    ended = threading.Event()
    quiet = stage.neighbour.work()

    def ask() -> None:
        request = model_pb2.GetServerCapabilitiesRequest()
        while not ended.wait(0.05):
            started_s = time.perf_counter()
            stage.hostile.send("ModelService/GetServerCapabilities", request)
            times["capabilities"].append(time.perf_counter() - started_s)

    with ThreadPoolExecutor(ATTACKERS + 1) as pool:
        others = [pool.submit(busy, ended) for _ in range(ATTACKERS)] + [pool.submit(ask)]
        deadline_s = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline_s:
                work = stage.neighbour.work(lambda what, took_s: times[what].append(took_s))
                assert work == quiet, "the neighbour's numbers are not those of a quiet hour"
                for other in others:
                    assert not other.done() or other.result() is None
        finally:
            ended.set()
        for other in others:
            other.result()
    return times


def honest(stage: Stage) -> Callable[[threading.Event], None]:
    def work(ended: threading.Event) -> None:
        while not ended.is_set():
            stage.honest.work()

    return work


def hostile(stage: Stage) -> Callable[[threading.Event], None]:
    def attack(ended: threading.Event) -> None:
        for number in range(10**9):
            if ended.is_set():
                return
            attack_of(stage.hostile, number)

    return attack


def attack_of(tenant: Hostile, number: int) -> None:
    ATTACKS[number % len(ATTACKS)](tenant)


def main() -> None:
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s")
    seconds = 60.0 * float(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        model = tiny_qwen3(Path(name, "model"))
        with staged(model, Path(name), SIZE_MIB) as stage:
            engines, before = stage.engines(), (stage.descriptors(), stage.resident_mib())
            beside = {
                "an honest tenant": hour(stage, honest(stage), seconds),
                "a hostile tenant": hour(stage, hostile(stage), seconds),
            }
            time.sleep(QUIET_S)
            after = stage.descriptors(), stage.resident_mib()
            assert stage.engines() == engines, "an engine has ended"
            assert not any("code=INTERNAL" in log for log in stage.logs())
    for whose, times in beside.items():
        for what, took in times.items():
            p50, p95, p99 = (1e3 * np.quantile(took, share) for share in (0.5, 0.95, 0.99))
            row = {"beside": whose, "what": what, "count": len(took)}
            row |= {"p50_ms": round(p50, 1), "p95_ms": round(p95, 1), "p99_ms": round(p99, 1)}
            logger.info(json.dumps(row))
    logger.info("descriptors and MiB of the fronts: before %s, after %s", before, after)


if __name__ == "__main__":
    main()
