"""`python -m trainer_service.checkpoints.conversion`: makes a checkpoint's files of an adapter from
elsewhere. A process of its own, since it holds a stranger's arrays in memory.
"""

from collections.abc import Mapping
from pathlib import Path

from checkpoint_store import FileEntry
from checkpoint_store.adapter_files import write_files
from checkpoint_store.errors import full_disk_told
from checkpoint_store.foreign.adapter import read_foreign_adapter
from mint_core.lora.spec import AdapterSpec
from trainer_service.checkpoints.apart import Convert, answer_once


def convert(job: Convert) -> tuple[AdapterSpec, int, Mapping[str, FileEntry]]:
    """Checks the adapter whole, and writes it."""
    adapter = read_foreign_adapter(Path(job.folder), job.model, job.base_model)
    with full_disk_told():
        files = write_files(
            Path(job.output_folder),
            adapter.weights,
            adapter.moments,
            spec=adapter.spec,
            base_model=job.model.name,
            base_fingerprint=job.model.fingerprint,
            step=adapter.step,
        )
    return adapter.spec, adapter.step, files


if __name__ == "__main__":
    answer_once(convert)
