"""The adapters in the engine's bank, by revision path."""

from collections.abc import Mapping

import psutil
import torch

from mint_core.errors import MintError
from mint_core.lora.bank import SAMPLING_PARTS, AdapterRow, Part
from mint_core.lora.spec import stored_rank
from mint_core.model.loading import LoadedBase
from sampler_service.jobs import BASE_MODEL, AdapterAbsent, DropAdapter, LoadAdapter

MEMORY_SHARE = 0.2  # of what is free after loading


class Adapters:
    """Rows of the bank. The front decides which are here and drops none that is in use."""

    def __init__(self, base: LoadedBase) -> None:
        self._bank = base.new_bank(SAMPLING_PARTS)
        self._rows: dict[str, AdapterRow] = {}

    @property
    def rows(self) -> Mapping[str, AdapterRow]:
        return self._rows

    def load(self, job: LoadAdapter) -> None:
        if job.revision_path in self._rows:
            return
        row = self._bank.add(job.spec)
        try:
            row.load(Part.WEIGHTS, job.weights)
        except MintError:
            self._bank.remove(row)
            raise
        self._rows[job.revision_path] = row

    def drop(self, job: DropAdapter) -> None:
        row = self._rows.pop(job.revision_path, None)
        if row is not None:
            self._bank.remove(row)

    def check(self, revision_path: str) -> None:
        """Refuses an adapter that is not here."""
        if revision_path != BASE_MODEL and revision_path not in self._rows:
            raise AdapterAbsent(
                f"the engine does not hold `{revision_path}`; send the call again",
                revision_path=revision_path,
            )


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
