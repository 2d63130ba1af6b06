"""Rows to files, some of them in the background, and back."""

import json
import platform
import queue
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoint_store import WeightsNotFinite, write_published_row
from checkpoint_store.row_file import Progress, RowDamaged, RowFile, save_row
from mint_core.engine_host.pipe import EnginePipe, Heartbeat, Part, Reply
from mint_core.lora.bank import AdapterRow
from mint_core.lora.bank import Part as RowPart
from mint_core.model.loading import LoadedBase
from trainer_service.engine.digests import digest
from trainer_service.engine.rows import TrainedRow
from trainer_service.errors import RowNotWritten, SnapshotFailed
from trainer_service.jobs import SnapshotCopied, SnapshotRow, SnapshotWritten, WriteRow


@dataclass(frozen=True, slots=True)
class RowCopy:
    """A row as it was, to be written."""

    path: Path
    parts: Mapping[str, Tensor]  # vectors [params] in host memory
    about: Mapping[str, str]

    def write(self, progress: Progress = lambda: None) -> SnapshotWritten:
        """Returns when the file is on disk. Raises SnapshotFailed."""
        arrays = {part: vector.numpy() for part, vector in self.parts.items()}
        try:
            return SnapshotWritten(save_row(self.path, arrays, self.about, progress))
        except OSError as error:
            raise SnapshotFailed(error) from error


def copy_row(job: SnapshotRow, trained: TrainedRow, base: LoadedBase) -> RowCopy:
    """Copies what of a row is needed to go on, the gradient if there is one."""
    return RowCopy(
        path=Path(job.path),
        parts={
            part.value: vector.detach().to("cpu", copy=True)
            for part, vector in trained.worth_keeping().items()
        },
        about={
            "training_run_id": job.training_run_id,
            "sequence": str(job.sequence),
            "step": str(trained.step),
            "gradient_pending": str(int(trained.gradient_pending)),
            "adapter": json.dumps(asdict(trained.row.spec)),
            "base_fingerprint": base.description.fingerprint,
            "engine": json.dumps(engine_traits(base)),
            "layout": trained.row.bank.layout.encoded.decode(),  # older files lack it
        },
    )


def engine_traits(base: LoadedBase) -> dict[str, str]:
    """On what a row's numbers may depend, beside all that is in the journal."""
    device = base.device
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "dtype": base.description.dtype,
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def read_row(file: RowFile, row: AdapterRow) -> None:
    """Fills the parts of a row from its file. Raises RowDamaged."""
    layout = row.bank.layout.encoded.decode()
    if file.length != row.bank.row_size or file.about.get("layout", layout) != layout:
        raise RowDamaged(file.path, "lies otherwise in memory than this version's rows")
    for part in file.digests:
        row.part(RowPart(part)).copy_(torch.from_numpy(file.read(part)))


def difference(file: RowFile, base: LoadedBase) -> str:
    """In which way the engine that wrote a file was another than this one."""
    theirs, ours = json.loads(file.about["engine"]), engine_traits(base)
    return ", ".join(
        f"{name} was {theirs.get(name)} and is {value}"
        for name, value in ours.items()
        if theirs.get(name) != value
    )


def write_weights(job: WriteRow, trained: TrainedRow, progress: Progress) -> None:
    """Writes the file from which samplers map a row. Raises WeightsNotFinite, RowNotWritten."""
    row, file, path = trained.row, Path(job.file), str(job.manifest.path)
    vector = row.part(RowPart.WEIGHTS)
    _check_finite(row, vector, path)
    trained.weight_digest = known = trained.weight_digest or digest(vector)
    numbers, layout = vector.cpu().numpy(), row.bank.layout
    try:
        write_published_row(file, numbers, layout, job.manifest, progress, known)
    except OSError as error:
        raise RowNotWritten(path, file.parent, error) from error


def _check_finite(row: AdapterRow, vector: Tensor, path: str) -> None:
    if vector.sum().isfinite():  # so all of them are; 20 times as fast as to ask each
        return
    for name, array in row.export(RowPart.WEIGHTS).items():
        if not np.isfinite(array).all():
            raise WeightsNotFinite(path, name)


class SnapshotWriter:
    """A thread that writes copies of rows, one after the other, and answers for the engine."""

    def __init__(self, pipe: EnginePipe) -> None:
        self._pipe = pipe
        self._queue: queue.SimpleQueue[tuple[int, RowCopy]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="snapshots").start()

    def put(self, number: int, copy: RowCopy) -> None:
        """Has the answer to a call written and sent."""
        self._pipe.send(Part(number, SnapshotCopied()))
        self._queue.put((number, copy))

    def _run(self) -> None:
        while True:
            number, copy = self._queue.get()
            try:
                answer = copy.write(lambda: self._pipe.send(Heartbeat()))
                self._pipe.send(Reply(number, answer))
            except BrokenPipeError:
                return  # the front is gone
            except Exception as error:
                self._pipe.fail(number, error)
