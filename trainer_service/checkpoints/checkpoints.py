"""Checkpoints of runs: what goes into the store and what may come out of it.

The store blocks, so threads wait for it.
"""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from checkpoint_store import (
    WEIGHTS,
    CheckpointStore,
    OpenCheckpoint,
    Published,
    SnapshotMemory,
)
from mint_core.engine_host.pipe import ModelDescription
from mint_core.lora.spec import AdapterSpec
from trainer_service.checkpoints.handoff import Handoff, Write
from trainer_service.checkpoints.sweeping import Sweeper
from trainer_service.errors import CheckpointMismatch
from trainer_service.jobs import RowArrays
from trainer_service.run.calls import Call, Load, Save, SaveForSampler
from trainer_service.run.description import RunOrigin


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint that is to be loaded."""

    checkpoint: OpenCheckpoint
    with_optimizer: bool

    @property
    def spec(self) -> AdapterSpec:
        return self.checkpoint.manifest.spec

    @property
    def revision_path(self) -> str:
        return str(self.checkpoint.manifest.revision_path)

    def check_base(self, base_model: str, base_fingerprint: str) -> None:
        """Refuses an adapter of another base model."""
        manifest = self.checkpoint.manifest
        if manifest.base_fingerprint != base_fingerprint:
            raise CheckpointMismatch(
                f"checkpoint `{self.revision_path}` belongs to base model {manifest.base_model} "
                "with fingerprint "
                f"{manifest.base_fingerprint}, and this is {base_model} with {base_fingerprint}; "
                "use a server of its base",
                path=self.revision_path,
                checkpoint_base_model=manifest.base_model,
                base_model=base_model,
            )

    def check_rank(self, model: ModelDescription) -> None:
        """Refuses an adapter larger than those served."""
        if self.spec.rank > model.max_lora_rank:
            raise CheckpointMismatch(
                f"checkpoint `{self.revision_path}` has rank {self.spec.rank} but the largest "
                "rank served here is "
                f"{model.max_lora_rank}; start the trainer with a larger --max-lora-rank",
                path=self.revision_path,
                rank=self.spec.rank,
                max_lora_rank=model.max_lora_rank,
            )

    def check_fits(self, origin: RunOrigin) -> None:
        """Refuses what cannot replace the weights; another scale would change what they mean."""
        self.check_base(origin.base_model, origin.base_fingerprint)
        theirs, ours = self.spec, origin.spec
        for what, found, wanted in (
            ("rank", theirs.rank, ours.rank),
            ("target modules", theirs.modules, ours.modules),
            ("scale of alpha and rank", theirs.scale, ours.scale),
        ):
            if found != wanted:
                raise CheckpointMismatch(
                    f"checkpoint `{self.revision_path}` has another {what} than the run "
                    f"({_brief(found)}, not "
                    f"{_brief(wanted)}); create a run from the checkpoint instead",
                    path=self.revision_path,
                    differs=what,
                )

    async def arrays(self) -> RowArrays:
        return await asyncio.to_thread(self._read)

    def _read(self) -> RowArrays:
        checkpoint = self.checkpoint
        if not self.with_optimizer:
            return RowArrays(weights=checkpoint.weights())
        return RowArrays(
            weights=checkpoint.weights(),
            exp_avg=checkpoint.exp_avg(),
            exp_avg_sq=checkpoint.exp_avg_sq(),
            step=checkpoint.manifest.step,
        )


class Checkpoints:
    """The store, for the runs of this trainer."""

    def __init__(self, store: CheckpointStore, memory: SnapshotMemory | None = None) -> None:
        self.store = store
        self.sweeper = Sweeper(store)
        self.handoff = Handoff(store, memory)

    async def open(self, load: Load, tenant: str) -> Opened:
        """Opens a checkpoint of the tenant's, whatever it fits."""
        kind = WEIGHTS if load.with_optimizer else None
        checkpoint = await asyncio.to_thread(self.store.open, load.path, tenant=tenant, kind=kind)
        return Opened(checkpoint, load.with_optimizer)

    async def publish_state(
        self, origin: RunOrigin, arrays: RowArrays, save: Save, call: Call
    ) -> Published:
        """Publishes training state; that of the same call once."""
        expire_time = self._expire_time(save.ttl_s)
        return await asyncio.to_thread(
            self.store.publish,
            training_run_id=origin.training_run_id,
            kind=WEIGHTS,
            name=save.name,
            tenant=origin.tenant,
            base_model=origin.base_model,
            base_fingerprint=origin.base_fingerprint,
            spec=origin.spec,
            weights=arrays.weights,
            exp_avg=arrays.exp_avg,
            exp_avg_sq=arrays.exp_avg_sq,
            step=arrays.step,
            metadata=save.metadata,
            sequence=call.place.sequence,
            mark=call.mark,
            overwrite=save.overwrite,
            expire_time=expire_time,
        )

    async def publish_adapter(
        self, origin: RunOrigin, save: SaveForSampler, call: Call, write: Write, *, step: int
    ) -> Published:
        """Publishes an adapter for samplers; `write` has the engine write its row, of that step."""
        expire_time = self._expire_time(save.ttl_s)
        return await self.handoff.publish(
            origin,
            save,
            write,
            step=step,
            sequence=call.place.sequence,
            mark=call.mark,
            expire_time=expire_time,
        )

    async def delete_run(self, origin: RunOrigin, *, named: bool) -> None:
        """Deletes a run's unnamed snapshots, and its named checkpoints if asked."""
        await self.handoff.delete_run(origin, named=named)

    def _expire_time(self, ttl_s: float | None) -> datetime | None:
        if ttl_s is None:
            return None
        expire_time = datetime.now(UTC) + timedelta(seconds=ttl_s)
        self.sweeper.note_expiry(expire_time)
        return expire_time


def _brief(value: object) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} modules"
    return f"{value:g}" if isinstance(value, float) else str(value)
