"""What jobs say of the files that they name."""

from dataclasses import fields, is_dataclass
from errno import EIO, ENOSPC
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mint_core.errors import EngineFault, ResourceExhausted
from trainer_service import jobs
from trainer_service.errors import RowNotSaved, RowNotWritten
from trainer_service.job_files import job_files

SAVED = Path("/state/rows")
MANIFEST: Any = SimpleNamespace(path="mint://a/weights/b")
SPEC: Any = None
ROW = "/memory/row"
CONFIG, WEIGHTS, OPTIMIZER = (
    f"/staged/{name}"
    for name in ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors")
)


def source(row_file: str = "", *, with_optimizer: bool = False) -> jobs.Source:
    return jobs.Source(
        revision_path="p",
        spec=SPEC,
        folder="/staged",
        row_file=row_file,
        with_optimizer=with_optimizer,
        step=0,
    )


def test_reads_and_writes_are_those_of_the_engine() -> None:
    saved = str(SAVED / "run-7.safetensors")
    save = jobs.SaveRow(training_run_id="run", sequence=7, optional=True)
    checkpoint = jobs.SaveCheckpoint(manifest=MANIFEST, folder="/staged", with_optimizer=True)
    expected: list[tuple[object, tuple[str, ...], tuple[str, ...]]] = [
        (save, (), (saved,)),
        (jobs.RestoreRow("run", SPEC, "run-7.safetensors"), (saved,), ()),
        (jobs.CreateRow("run", source(with_optimizer=True)), (WEIGHTS, OPTIMIZER), ()),
        (jobs.CreateRow("run", SPEC), (), ()),
        (jobs.LoadRow("run", source(ROW)), (ROW,), ()),
        (jobs.LoadRow("run", source(ROW, with_optimizer=True)), (ROW, OPTIMIZER), ()),
        (jobs.WriteRow(ROW, MANIFEST), (), (ROW,)),
        (jobs.StoreRow(ROW, MANIFEST, "/staged"), (ROW,), (CONFIG, WEIGHTS)),
        (checkpoint, (), (CONFIG, WEIGHTS, OPTIMIZER)),
    ]
    files = job_files(SAVED)
    for job, reads, writes in expected:
        found = files(job)
        assert (found.reads, found.writes) == (reads, writes), job


def test_no_job_names_a_file_and_says_nothing_of_it() -> None:
    """A job that is new, and names one, belongs into the table above."""
    naming = {
        name
        for name, kind in vars(jobs).items()
        if isinstance(kind, type)
        and is_dataclass(kind)
        and kind.__module__ == jobs.__name__
        and {field.name for field in fields(kind)} & {"file", "folder", "source", "row_file"}
    }
    told = {"LoadRow", "RestoreRow", "SaveCheckpoint", "StoreRow", "WriteRow"}
    assert naming - {"Source", "SavedRow"} == told


def test_what_a_full_disk_of_the_front_is_called() -> None:
    files = job_files(SAVED)
    full = OSError(ENOSPC, "No space left on device")
    save = jobs.SaveRow(training_run_id="run", sequence=7, optional=True)
    store = jobs.SaveCheckpoint(manifest=MANIFEST, folder="/staged", with_optimizer=False)
    assert isinstance(files(save).refusal(full), RowNotSaved)
    assert isinstance(files(jobs.WriteRow(ROW, MANIFEST)).refusal(full), RowNotWritten)
    assert isinstance(files(store).refusal(full), ResourceExhausted)
    assert isinstance(files(store).refusal(OSError(EIO, "Input/output error")), EngineFault)
