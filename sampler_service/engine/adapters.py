"""The adapters in the engine's bank, by revision path."""

from collections.abc import Mapping

from mint_core.errors import MintError
from mint_core.lora.bank import SAMPLING_PARTS, AdapterRow, Part
from mint_core.model.loading import LoadedBase
from sampler_service.jobs import BASE_MODEL, AdapterAbsent, DropAdapter, LoadAdapter


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
