"""Passes over tensors that stay where they are, recorded in CUDA graphs and replayed.

A pass of few rows is thousands of small kernels, and launching them one by one takes longer than
they run. A graph is one launch; it reads and writes the same memory each time, so what changes
between passes is data in tensors that stay where they are, and no shape.
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Pass = Callable[[], None]  # has no arguments and no result


class NotRecordable(Exception):
    """Raised by a pass, before it has changed anything, that must not be recorded: what it
    computes is launched otherwise.
    """


class NotRecorded(Exception):
    """A graph could not be made. Nothing was computed."""


class Recorder(Protocol):
    """Makes passes faster to start."""

    def first(self, compute: Pass) -> None:
        """Computes a pass as it is, before it is recorded."""
        ...

    def record(self, compute: Pass) -> Pass:
        """What computes the same from then on; this itself computes nothing. Raises NotRecorded."""
        ...


class GraphRecorder:
    """Makes CUDA graphs. They share their memory: of all of them one runs at a time, and what it
    leaves is read before the next one runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def first(self, compute: Pass) -> None:
        """On the stream of recordings: kernels are compiled, and libraries set up."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            compute()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, compute: Pass) -> Pass:
        """See Recorder."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()  # what fails before must not be taken for what cannot be recorded
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                compute()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise NotRecorded(str(error)) from error
        return graph.replay


class Recordings:
    """Passes by what they have room for, each computed once whenever it is asked for: as it is at
    first, so that what comes once is not recorded, and recorded from its second time on.
    """

    def __init__(self, recorder: Recorder | None, most: int = 64) -> None:
        self.recorder = recorder  # None: passes are computed as they are
        self._most = most  # graphs; the one that was not asked for longest goes
        self.passes: OrderedDict[Any, Pass | None] = OrderedDict()  # None: not recorded yet

    def run(self, key: Hashable, compute: Pass) -> None:
        """Computes a pass; of a key it is always the same. Raises NotRecorded."""
        if key not in self.passes:
            (self.recorder.first if self.recorder else _as_it_is)(compute)
            self.passes[key] = None  # not before: what has failed may not be ready
            while len(self.passes) > self._most:
                self.passes.popitem(last=False)
            return
        self.passes.move_to_end(key)
        replay = self.passes[key]
        if replay is None:
            replay = self.passes[key] = self.recorder.record(compute) if self.recorder else compute
        replay()

    def run_anyhow(self, key: Hashable, compute: Pass) -> None:
        """As `run`, but nothing is recorded any more once something could not be."""
        try:
            self.run(key, compute)
        except NotRecorded as problem:
            logger.warning("passes are launched from now on: %s", problem)
            self.recorder = None
            self.passes.clear()
            self.run(key, compute)


def _as_it_is(compute: Pass) -> None:
    compute()


class Inputs:
    """Named arrays of fixed shapes, in one buffer of the host and one of the device: a copy brings
    them all.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], device: torch.device
    ) -> None:
        words = [-(-math.prod(shape) * kind.itemsize // 8) for kind, shape in shapes.values()]
        pinned: dict[str, Any] = {"pin_memory": True} if device.type == "cuda" else {}
        self._host = torch.zeros(sum(words), dtype=torch.int64, **pinned)
        self._device = torch.zeros(sum(words), dtype=torch.int64, device=device)

        def views(buffer: Tensor) -> dict[str, Tensor]:
            parts = zip(shapes.items(), buffer.split(words), strict=True)
            return {
                name: part.view(kind)[: math.prod(shape)].view(shape)
                for (name, (kind, shape)), part in parts
            }

        self.host = {name: view.numpy() for name, view in views(self._host).items()}
        self.device = views(self._device)

    def clear(self) -> None:
        """Makes the host's zero. What was sent must have been read."""
        self._host.numpy().fill(0)

    def send(self) -> None:
        self._device.copy_(self._host, non_blocking=True)


def reads_lengths(config: Any) -> bool:
    """Whether a model of this configuration reads on the host how long the longest sequence is, as
    rotary embeddings of some kinds do. What it does then cannot be recorded.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    # Either one set of parameters, or one for each kind of layer.
    sets = (rope, *(value for value in rope.values() if isinstance(value, dict)))
    kinds = {str(parameters.get("rope_type")) for parameters in sets}
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)
