"""Which files jobs name, for engines that do not have the front's disk."""

from functools import partial
from pathlib import Path

from checkpoint_store.adapter_files import CONFIG_FILE, OPTIMIZER_FILE, WEIGHTS_FILE
from checkpoint_store.errors import full_disk_told
from mint_core.engine_host.carried import NO_FILES, FilesOf, JobFiles, unwritten
from mint_core.errors import MintError
from trainer_service import jobs
from trainer_service.errors import RowNotSaved, RowNotWritten


def job_files(saved_rows: Path) -> FilesOf:
    """`saved_rows`: the folder of saved rows."""

    def files(job: object) -> JobFiles:
        match job:
            case jobs.CreateRow(request=jobs.Source() as source) | jobs.LoadRow(source=source):
                return JobFiles(reads=_read(source))
            case jobs.RestoreRow(file=file):
                return JobFiles(reads=(str(saved_rows / file),))
            case jobs.SaveRow(training_run_id=run, sequence=sequence):
                name = jobs.saved_row_name(run, sequence)
                return JobFiles(writes=(str(saved_rows / name),), refusal=RowNotSaved)
            case jobs.WriteRow(file=file, manifest=manifest):
                refusal = partial(RowNotWritten, str(manifest.path), Path(file).parent)
                return JobFiles(writes=(file,), refusal=refusal)
            case jobs.SaveCheckpoint(folder=folder, with_optimizer=with_optimizer):
                return JobFiles(writes=_checkpoint(folder, with_optimizer), refusal=_not_stored)
            case jobs.StoreRow(file=file, folder=folder):
                return JobFiles((file,), _checkpoint(folder), refusal=_not_stored)
        return NO_FILES

    return files


def _read(source: jobs.Source) -> tuple[str, ...]:
    weights = source.row_file or str(Path(source.folder, WEIGHTS_FILE))
    return (weights, str(Path(source.folder, OPTIMIZER_FILE)))[: 1 + source.with_optimizer]


def _checkpoint(folder: str, with_optimizer: bool = False) -> tuple[str, ...]:
    names = (CONFIG_FILE, WEIGHTS_FILE, OPTIMIZER_FILE)[: 2 + with_optimizer]
    return tuple(str(Path(folder, name)) for name in names)


def _not_stored(error: OSError) -> MintError:
    try:
        with full_disk_told():
            raise error
    except MintError as told:
        return told
    except OSError:
        return unwritten(error)
