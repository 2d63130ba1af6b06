"""Compares variants in one run, in turn, and reports a table and one JSON line per row."""

import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Variant = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure beside its target. `ratio` is how many times less ours takes, or, where lower is
    better, what share of the baseline ours is.
    """

    name: str
    ours: float
    baseline: float
    ratio: float
    target: float | None  # None: none was set
    unit: str
    better: str = "higher"

    def met(self) -> bool:
        if self.target is None:
            return True
        return self.ratio <= self.target if self.better == "lower" else self.ratio >= self.target


def faster(
    name: str, ours: Sequence[float], baseline: Sequence[float], target: float | None
) -> Row:
    """How many times the time of ours the baseline takes, as the median of the rounds."""
    ratios = [b / o for o, b in zip(ours, baseline, strict=True)]
    return Row(
        name, _median(ours), _median(baseline), statistics.median(ratios), target, "CPU seconds"
    )


def share(
    name: str, ours: Sequence[float], baseline: Sequence[float], target: float | None, unit: str
) -> Row:
    """Ours as a share of the baseline, as the median of the rounds; lower is better."""
    ratios = [o / b for o, b in zip(ours, baseline, strict=True)]
    return Row(
        name, _median(ours), _median(baseline), statistics.median(ratios), target, unit, "lower"
    )


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def cpu_seconds(call: Variant) -> float:
    """What a call costs this process. Unlike wall time it leaves out waiting for a busy core."""
    started = time.process_time()
    call()
    return time.process_time() - started


def in_turn(
    variants: Mapping[str, Variant], rounds: int, *, warm: bool = False
) -> dict[str, list[float]]:
    """CPU seconds of each variant in each round, after one round to warm up unless all are warm."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warm, rounds + 1):
        for name, call in variants.items():
            seconds = cpu_seconds(call)
            if number:
                times[name].append(seconds)
    return times


def peak_bytes(call: Variant) -> int:
    """By how much a call raises this process's resident memory at its peak. Linux alone."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls freed would hide the peak
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(kilobytes)


def report(rows: Sequence[Row]) -> None:
    """Prints the table, then the JSON lines."""
    print(f"{'':52}{'ours':>10}{'baseline':>10}{'ratio':>8}{'target':>8}")
    for row in rows:
        sign = "<=" if row.better == "lower" else ">="
        target = "" if row.target is None else f"{sign} {row.target:g}"
        print(
            f"{row.name:52}{row.ours:10.4g}{row.baseline:10.4g}{row.ratio:8.3f}{target:>8}"
            f"  {row.unit}{'' if row.met() else '  MISSED'}"
        )
    for row in rows:
        print(json.dumps(_json(row)))


def _json(row: Row) -> dict[str, Any]:
    fields = asdict(row)
    return fields if row.better == "lower" else {k: v for k, v in fields.items() if k != "better"}
