"""The adapters in the engine's bank, by revision path."""

from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from torch import Tensor

from checkpoint_store import CheckpointDamaged, PublishedRow, open_row
from checkpoint_store.row_file import RowMissing
from mint_core.lora.bank import SAMPLING_PARTS, AdapterRow, Part
from mint_core.lora.row_layout import RowLayout
from mint_core.lora.spec import stored_rank
from mint_core.model.loading import LoadedBase
from sampler_service.jobs import BASE_MODEL, AdapterAbsent, DropAdapter, LoadAdapter, RowUnusable

MEMORY_SHARE = 0.2  # of what is free after loading
HOST_SHARE = 0.2  # of free host memory, beside a GPU


class HostRows:
    """Rows in host memory, beside a GPU, up to a limit; those used least recently go first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._rows: dict[str, Tensor] = {}  # the least recently used first
        self.size_bytes = 0

    def __contains__(self, revision_path: str) -> bool:
        return revision_path in self._rows

    def get(self, revision_path: str) -> Tensor:
        row = self._rows[revision_path] = self._rows.pop(revision_path)
        return row

    def put(self, revision_path: str, row: Tensor) -> None:
        """Takes a row in, unless it alone exceeds the limit."""
        if row.nbytes > self._limit_bytes:
            return
        while self.size_bytes + row.nbytes > self._limit_bytes:
            oldest = self._rows.pop(next(iter(self._rows)))
            self.size_bytes -= oldest.nbytes
        self._rows[revision_path] = row
        self.size_bytes += row.nbytes


class Adapters:
    """Rows of the bank. The front decides which are here and drops none that is in use.

    On a CPU a row is the pages of its file. A GPU gets it from pinned host memory, which keeps
    what was used lately.
    """

    def __init__(self, base: LoadedBase, host_memory_bytes: int = 0) -> None:
        self._device = base.device
        self._bank = base.new_bank(SAMPLING_PARTS)
        self._rows: dict[str, AdapterRow] = {}
        self._host = HostRows(host_memory_bytes or host_limit_bytes())

    @property
    def rows(self) -> Mapping[str, AdapterRow]:
        return self._rows

    def layout(self, rank: int) -> RowLayout:
        return self._bank.rank_class(rank).layout

    def load(self, job: LoadAdapter) -> None:
        if job.revision_path in self._rows:
            return
        try:
            self._rows[job.revision_path] = self._mapped(job)
        except (RowMissing, CheckpointDamaged) as error:
            raise RowUnusable(f"`{job.file}` cannot be used: {error}") from error

    def drop(self, job: DropAdapter) -> None:
        row = self._rows.pop(job.revision_path, None)
        if row is not None:
            row.leave()

    def check(self, revision_path: str) -> None:
        """Refuses an adapter that is not here."""
        if revision_path != BASE_MODEL and revision_path not in self._rows:
            raise AdapterAbsent(
                f"the engine does not hold `{revision_path}`; send the call again",
                revision_path=revision_path,
            )

    def _mapped(self, job: LoadAdapter) -> AdapterRow:
        published = open_row(Path(job.file), job.revision_path)
        row = self._bank.add(published.manifest.spec)
        if published.layout != row.bank.layout:
            raise RowUnusable(f"the numbers of `{job.file}` lie otherwise than rows do here")
        row.come_back({Part.WEIGHTS: self._numbers(job.revision_path, published)})
        return row

    def _numbers(self, revision_path: str, published: PublishedRow) -> Tensor:  # [params]
        """A row on the device."""
        if self._device.type == "cpu":
            return torch.from_numpy(published.numbers())
        if revision_path in self._host:
            pinned = self._host.get(revision_path)
        else:
            pinned = torch.from_numpy(published.numbers()).pin_memory()
            self._host.put(revision_path, pinned)
        return pinned.to(self._device, non_blocking=True)


def host_limit_bytes() -> int:
    """Host memory at hand for rows beside a GPU."""
    return int(HOST_SHARE * psutil.virtual_memory().available)


def affordable_ranks(base: LoadedBase, memory_bytes: int) -> int:
    """The largest sum of stored ranks that memory for adapters holds; one adapter always fits."""
    if not memory_bytes:
        free = (
            torch.cuda.mem_get_info(base.device)[0]
            if base.device.type == "cuda"
            else psutil.virtual_memory().available
        )
        memory_bytes = int(MEMORY_SHARE * free)
    rank_bytes = 4 * sum(shape.in_features + shape.out_features for shape in base.shapes.values())
    return max(memory_bytes // rank_bytes, stored_rank(base.description.max_lora_rank))
