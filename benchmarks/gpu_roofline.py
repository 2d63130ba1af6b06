"""The part of the checklist that names what keeps tensor cores idle: a large training pass by its
operators and shapes, each with its share of the time, its FLOPs and the bytes that it must move,
against the chip's two limits. The table is of the whole pass: layers are alike, so a layer's is it
over their number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_models import Bench, copied_bytes_per_s
from benchmarks.gpu_trainer import PEAK, Runs, documents, engine_of

ROWS = 24
BYTES = 2  # of a number in bfloat16
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


@dataclass(frozen=True)
class Operator:
    """Calls of one operator with one set of shapes; its time is of the kernels it started."""

    name: str
    shapes: Sequence[Sequence[int]]
    calls: int
    seconds: float

    @property
    def flops(self) -> float:
        """Of matrix products; others are bound by what they move."""
        if self.name not in PRODUCTS:
            return 0.0
        *_, left, right = (shape for shape in self.shapes if len(shape) >= 2)
        return 2.0 * self.calls * math.prod(left) * right[-1]

    @property
    def moved_bytes(self) -> float:
        """What it reads, and as much as its largest input, or its product, written."""
        sizes = [math.prod(shape) for shape in self.shapes if shape]
        written = max(sizes, default=0)
        if self.name in PRODUCTS:
            *_, left, right = (shape for shape in self.shapes if len(shape) >= 2)
            written = math.prod(left[:-1]) * right[-1]
        return float(BYTES * self.calls * (sum(sizes) + written))

    def least_s(self, bytes_per_s: float) -> float:
        """By the limit that is nearer."""
        return max(self.flops / PEAK, self.moved_bytes / bytes_per_s)


def roofline(bench: Bench) -> None:
    """Passes of 16k tokens in documents of 512 over 0.6B, and of 4k over 8B."""
    bytes_per_s = copied_bytes_per_s(bench)
    for name, count in (("0.6B", 32), ("8B", 8)):
        with engine_of(bench, name) as engine:
            engine.recorded = None  # a recorded pass is one launch, of no operator
            run, data = Runs(engine, 1), documents(bench, [512] * count)
            found = operators(bench, lambda: run.backward(data))  # noqa: B023
        total_s = sum(each.seconds for each in found)
        least_s = sum(each.least_s(bytes_per_s) for each in found)
        print(f"-- {name}: ms, share, TFLOP/s, GB/s, least time over time, calls, operator, shapes")
        for each in found[:ROWS]:
            seconds, least_part = each.seconds, each.least_s(bytes_per_s) / each.seconds
            shapes = ["x".join(map(str, shape)) for shape in each.shapes if shape]
            print(
                f"{1e3 * seconds:9.3f} {seconds / total_s:5.1%} {each.flops / seconds / 1e12:6.0f}"
                f"{each.moved_bytes / seconds / 1e9:7.0f} {least_part:5.2f}"
                f"{each.calls:6} x {each.name} {' '.join(shapes)}"
            )
        products_s = sum(each.seconds for each in found if each.flops)
        bench.note(f"{name}: time of all operators", 1e3 * total_s, "ms")
        bench.note(f"{name}: of it in matrix products", products_s / total_s, "share")
        bench.note(f"{name}: least time of all over their time", least_s / total_s, "share")


def operators(bench: Bench, call: Any) -> list[Operator]:
    """Those that a call runs, the longest first. Without a GPU the time is the host's."""
    call()
    bench.wait()
    kinds = [ProfilerActivity.CPU, *([] if bench.tiny else [ProfilerActivity.CUDA])]
    with profile(activities=kinds, record_shapes=True) as seen:
        call()
        bench.wait()
    kind = "self_cpu_time_total" if bench.tiny else "self_device_time_total"
    found = [
        Operator(event.key, _shapes(event.input_shapes), event.count, getattr(event, kind) / 1e6)
        for event in seen.key_averages(group_by_input_shape=True)
        if getattr(event, kind) > 0 and event.device_type == torch.autograd.DeviceType.CPU
    ]
    return sorted(found, key=lambda each: -each.seconds)


def _shapes(told: Any) -> list[list[int]]:
    """Lists of tensors are told as lists of lists."""
    flat: list[list[int]] = []
    for shape in told or ():
        flat += shape if shape and isinstance(shape[0], list) else [shape]
    return flat
