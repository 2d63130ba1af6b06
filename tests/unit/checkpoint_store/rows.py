"""Row files in memory, for tests."""

from pathlib import Path

from checkpoint_store import Manifest, SnapshotMemory, new_manifest, write_published_row
from mint_core.lora.row_layout import Matrix, RowLayout
from tests.unit.checkpoint_store.conftest import SPEC, adapter

LAYOUT = RowLayout.of(  # of what `adapter` draws, with numbers that belong to nobody around it
    100_000,
    {
        "lm_head": (Matrix(1, 4, 6, 6, 1), Matrix(25, 8, 4, 1, 8)),
        "model.layers.0.q_proj": (Matrix(57, 4, 6, 6, 1), Matrix(81, 8, 4, 1, 8)),
    },
)
NUMBERS_BYTES = 4 * LAYOUT.size


def snapshot(name: str | None = None, **changes: object) -> Manifest:
    """Of a new adapter."""
    fields = {
        "training_run_id": "r-1",
        "kind": "sampler_weights",
        "tenant": "t",
        "base_model": "tiny",
        "base_fingerprint": "f00d",
        "spec": SPEC,
        "step": 3,
    }
    return new_manifest(name, Manifest(**(fields | changes)))  # type: ignore[arg-type]


def write_snapshot(
    file: Path, manifest: Manifest, seed: int = 0, layout: RowLayout = LAYOUT
) -> None:
    """Writes the row of an adapter that is drawn from the seed."""
    numbers = layout.row(SPEC, adapter(seed)["weights"])
    write_published_row(file, numbers, layout, manifest)


def remember(
    memory: SnapshotMemory, manifest: Manifest, *, seed: int = 0, stored: bool = False
) -> Manifest:
    """Puts an adapter into memory."""
    draft = memory.draft(NUMBERS_BYTES)
    assert draft is not None
    write_snapshot(draft, manifest, seed)
    memory.place(draft, manifest, stored=stored)
    return manifest
