"""Checkpoints of runs: what goes into the store and what may come out of it.

The store blocks, so threads wait for it.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from checkpoint_store import (
    SAMPLER_WEIGHTS,
    WEIGHTS,
    CheckpointStore,
    Manifest,
    SnapshotMemory,
    new_manifest,
)
from mint_core.engine_host.pipe import ModelDescription
from trainer_service.calls import Call, Load, Save
from trainer_service.checkpoints.handoff import Handoff
from trainer_service.checkpoints.staging import Write, publish
from trainer_service.checkpoints.sweeping import Sweeper
from trainer_service.errors import CheckpointMismatch
from trainer_service.jobs import SaveCheckpoint, Source
from trainer_service.run_description import RunOrigin


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint that is to be loaded."""

    manifest: Manifest
    source: Source

    @property
    def revision_path(self) -> str:
        return self.source.revision_path

    def check_served(self, model: ModelDescription) -> None:
        """Refuses an adapter of another base model, or larger than those served."""
        check_base(self.manifest, model)
        path, rank = self.revision_path, self.source.spec.rank
        if rank > model.max_lora_rank:
            raise CheckpointMismatch(
                f"checkpoint `{path}` has rank {rank} but the largest rank served here is "
                f"{model.max_lora_rank}; start the trainer with a larger --max-lora-rank",
                path=path,
                rank=rank,
                max_lora_rank=model.max_lora_rank,
            )

    def check_fits(self, origin: RunOrigin, model: ModelDescription) -> None:
        """Refuses what cannot replace the weights; another scale would change what they mean."""
        check_base(self.manifest, model)
        path, theirs, ours = self.revision_path, self.source.spec, origin.spec
        for what, found, wanted in (
            ("rank", theirs.rank, ours.rank),
            ("target modules", theirs.modules, ours.modules),
            ("scale of alpha and rank", theirs.scale, ours.scale),
        ):
            if found != wanted:
                raise CheckpointMismatch(
                    f"checkpoint `{path}` has another {what} than the run "
                    f"({_brief(found)}, not "
                    f"{_brief(wanted)}); create a run from the checkpoint instead",
                    path=path,
                    differs=what,
                )


class Checkpoints:
    """The store, for the runs of this trainer."""

    def __init__(
        self, store: CheckpointStore, memory: SnapshotMemory | None, store_row: Write
    ) -> None:
        """`store_row` has an engine do a `StoreRow`."""
        self.store = store
        self.sweeper = Sweeper(store)
        self.handoff = Handoff(store, memory, store_row)

    async def open(self, load: Load, tenant: str) -> Opened:
        """Opens a checkpoint of the tenant's, whatever it fits."""
        kind = WEIGHTS if load.with_optimizer else None
        found = await self.store.in_turn(
            tenant, self.store.open, load.path, tenant=tenant, kind=kind
        )
        source = Source(
            revision_path=str(found.manifest.revision_path),
            spec=found.manifest.spec,
            folder=str(found.folder),
            row_file=str(found.row.file.path) if found.row else "",
            with_optimizer=load.with_optimizer,
            step=found.manifest.step if load.with_optimizer else 0,
        )
        return Opened(found.manifest, source)

    async def save(
        self, origin: RunOrigin, save: Save, call: Call, write: Write, *, step: int
    ) -> Manifest:
        """Publishes training state, or an adapter for samplers; those of the same call once.
        `write` has the engine write the run's row, of that step.
        """
        manifest = self._manifest(origin, save, call, step)
        if save.kind == SAMPLER_WEIGHTS:
            return await self.handoff.publish(manifest, origin.row_bytes, write)
        job = partial(SaveCheckpoint, manifest=manifest, with_optimizer=True)
        return await publish(self.store, manifest, job, write, overwrite=save.overwrite)

    def _manifest(self, origin: RunOrigin, save: Save, call: Call, step: int) -> Manifest:
        expire_time = None
        if save.ttl_s is not None:
            expire_time = datetime.now(UTC) + timedelta(seconds=save.ttl_s)
            self.sweeper.note_expiry(expire_time)
        return new_manifest(
            save.name,
            Manifest(
                training_run_id=origin.training_run_id,
                kind=save.kind,
                tenant=origin.tenant,
                base_model=origin.base_model,
                base_fingerprint=origin.base_fingerprint,
                spec=origin.spec,
                step=step,
                metadata=save.metadata,
                sequence=call.place.sequence,
                mark=call.mark,
                expire_time=expire_time,
            ),
        )


def check_base(manifest: Manifest, model: ModelDescription) -> None:
    """Refuses an adapter of another base model."""
    theirs = manifest.base_fingerprint
    if not model.opens(theirs):
        path = str(manifest.revision_path)
        raise CheckpointMismatch(
            f"checkpoint `{path}` belongs to base model {manifest.base_model} with fingerprint "
            f"{theirs}, and this is {model.name} with {model.fingerprint}; "
            + model.remedy(theirs, "use a server of its base"),
            path=path,
            checkpoint_base_model=manifest.base_model,
            base_model=model.name,
        )


def _brief(value: object) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} modules"
    return f"{value:g}" if isinstance(value, float) else str(value)
