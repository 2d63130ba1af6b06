"""The adapters in the engine's bank, by revision path."""

import torch
from torch import Tensor

from checkpoint_store import CheckpointDamaged, PublishedRow, open_row
from checkpoint_store.row_file import RowMissing
from mint_core.engine_host.carried import here
from mint_core.errors import FailedPrecondition
from mint_core.lora.bank import AdapterRow, Part
from mint_core.lora.row_layout import RowLayout
from mint_core.lora.spec import AdapterSpec
from mint_core.model.loading import LoadedBase
from sampler_service.jobs import BASE_MODEL, AdapterAbsent, DropAdapter, LoadAdapter, RowUnusable


class HostRows:
    """Rows in host memory, beside a GPU, up to a limit; those used least recently go first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._rows: dict[str, Tensor] = {}  # the least recently used first
        self.size_bytes = 0

    def get(self, revision_path: str) -> Tensor | None:
        row = self._rows.pop(revision_path, None)
        if row is not None:
            self._rows[revision_path] = row
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


class LoadedAdapters:
    """Rows of the bank. The front decides which are here and drops none that is in use.

    On a CPU a row is the pages of its file. A GPU gets it from pinned host memory, which keeps
    what was used lately.
    """

    def __init__(self, base: LoadedBase, host_bytes: int) -> None:
        self._device = base.device
        self.bank = base.new_bank()
        self.rows: dict[str, AdapterRow] = {}  # by revision path
        self.host = HostRows(host_bytes)

    def layout(self, rank: int) -> RowLayout:
        return self.bank.rank_class(rank).layout

    def load(self, job: LoadAdapter) -> None:
        if job.revision_path in self.rows:
            return
        try:
            published = open_row(here(job.file), job.revision_path)
            _check_scale(published.manifest.spec, job.revision_path)
            row = self.bank.add(published.manifest.spec)
            if published.layout != row.bank.layout:
                raise RowUnusable(f"the numbers of `{job.file}` lie otherwise than rows do here")
            row.come_back({Part.WEIGHTS: self._numbers(job.revision_path, published)})
        except (RowMissing, CheckpointDamaged) as error:
            raise RowUnusable(f"`{job.file}` cannot be used: {error}") from error
        self.rows[job.revision_path] = row

    def drop(self, job: DropAdapter) -> None:
        row = self.rows.pop(job.revision_path, None)
        if row is not None:
            row.leave()

    def check(self, revision_path: str) -> None:
        """Refuses an adapter that is not here."""
        if revision_path != BASE_MODEL and revision_path not in self.rows:
            raise AdapterAbsent(
                f"the engine does not hold `{revision_path}`; send the call again",
                revision_path=revision_path,
            )

    def _numbers(self, revision_path: str, published: PublishedRow) -> Tensor:  # [params]
        """A row on the device."""
        if self._device.type == "cpu":
            return torch.from_numpy(published.numbers())
        pinned = self.host.get(revision_path)
        if pinned is None:
            pinned = torch.from_numpy(published.numbers()).pin_memory()
            self.host.put(revision_path, pinned)
        return pinned.to(self._device, non_blocking=True)


def _check_scale(spec: AdapterSpec, revision_path: str) -> None:
    """Refuses an adapter whose scale is no float32, in which it is applied."""
    if not spec.scale <= torch.finfo(torch.float32).max:
        raise FailedPrecondition(
            f"adapter `{revision_path}` cannot be used: alpha {spec.alpha:g} at rank {spec.rank} "
            "makes a scale that float32 does not hold; train one with a smaller `alpha`",
            model_path=revision_path,
        )
