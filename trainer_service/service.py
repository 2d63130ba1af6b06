"""The trainer, put together."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from checkpoint_store import SnapshotMemory, open_store, snapshot_folder
from mint_core.access.door import Door
from mint_core.backlog import Load
from mint_core.engine_host.process import EngineProcess
from mint_core.hosting.engine_hosts import engine_hosts
from mint_core.hosting.tasks import Tasks
from mint_core.rpc.hosting import RpcServer
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.model_service import ModelServicer, add_model_service
from mint_core.rpc.quotas import QuotaBook
from mint_core.turns import Turns, Workers
from mintrpc.v1 import checkpoint_pb2_grpc, model_pb2, trainer_pb2_grpc
from trainer_service.checkpoints.checkpoints import Checkpoints
from trainer_service.checkpoints.servicer import CheckpointServicer
from trainer_service.config import TrainerConfig
from trainer_service.groups.desk import GroupDesk
from trainer_service.groups.group import Group
from trainer_service.groups.groups import Groups
from trainer_service.job_files import job_files
from trainer_service.journal.ledger import check_base
from trainer_service.journal.state_size import StateSize
from trainer_service.journal.writer import Journal
from trainer_service.queue.admission import Admission
from trainer_service.queue.usage import Usage
from trainer_service.run.call_numbers import CallLimits
from trainer_service.run.retention import Clock
from trainer_service.run.saved_rows import SavedRows
from trainer_service.run.services import RunServices
from trainer_service.run_directory import RunDirectory
from trainer_service.run_table import RunTable
from trainer_service.runs import Runs
from trainer_service.servicer import TrainerServicer
from trainer_service.wire.idempotency import remembered_ids

logger = logging.getLogger(__name__)

ENGINE_MODULE = "trainer_service.engine"
RESTORATIONS = 8  # rows together, after an engine's death: passes are filled, answers come soon
LOSS_FNS = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo")
FEATURES = (
    "texts",
    "admin",
    "watch_training_run",
    "resume_watch",
    "isolated",
    "retention",
    "checkpoints",
    "export_progress",
    "export_ttl",
    "list_filters",
    "upload_base_model",
    "for_tenant",
    "typed_tensors",
    "routed_experts",
    "groups",
)


_OF_GROUPS: Sequence[tuple[str, str, Callable[[Group], float]]] = (
    ("mint_group_ready", "1 while the group's engine is up", lambda group: group.engine.ready),
    ("mint_group_tokens", "Tokens computed, as planned", lambda group: group.meter.tokens),
    ("mint_group_busy_seconds", "Time of its engine", lambda group: group.meter.busy_s),
    ("mint_group_restarts", "Times it was started again", lambda group: group.engine.restarts),
)


class TrainerService:
    """Engines and what stands between them and the network."""

    def __init__(
        self,
        config: TrainerConfig,
        metrics: Metrics,
        door: Door,
        quotas: QuotaBook,
        engine_module: str = ENGINE_MODULE,
        clock: Clock = time.monotonic,
    ) -> None:
        self._config = config
        self.tasks = Tasks()
        self.table = RunTable(quotas)
        files, count = job_files(config.saved_row_folder), len(config.group_devices)
        hosts = engine_hosts(config, files, config.row_folders, count=count)
        self.groups = groups = Groups(
            config,
            lambda config, number: EngineProcess(engine_module, config, hosts(number)),
            Usage(metrics),
            door.weight_of,
            self.table,
            self.tasks,
        )
        self.engine = groups.engines
        self.group_desk = GroupDesk(groups, self.tasks)
        self._checkpoints = _checkpoints(config, groups, metrics)
        self.journal = Journal(config.state_folder)
        quota_bytes = int(config.state_quota_gib * 2**30)
        self._size = StateSize(config.state_folder, quota_bytes, self.journal.reserve, metrics)
        self._admission = Admission(
            self.journal,
            self._size,
            metrics.queue_depth,
            Load(count=config.queue_calls, tokens=config.queue_tokens),
            per_run=not door.tells_tenants,
            predict=groups.predict_s,
        )
        self.services = RunServices(
            groups=groups,
            checkpoints=self._checkpoints,
            saved_rows=SavedRows(
                config.saved_row_folder,
                self.tasks,
                interval_s=config.snapshot_s,
                metrics=metrics,
            ),
            tasks=self.tasks,
            decoders=Workers(1, "decoding"),
            restorations=Turns(RESTORATIONS),
            rows_restored=metrics.counter(
                "mint_rows_restored", "Rows restored after their engine had ended"
            ),
            inexact_replays=metrics.counter(
                "mint_inexact_replays", "Rows that are not to the bit what they were before"
            ),
        )
        self._quotas, self._ids = quotas, remembered_ids(quotas)
        self.runs = Runs(
            self.services,
            self.journal,
            self._admission,
            CallLimits(gap_s=config.gap_s),
            self.table,
            self._ids,
            metrics,
            retention_s=config.retention_days * 86_400,
            clock=clock,
        )
        self._add_gauges(metrics)

    def add_to(self, server: RpcServer) -> None:
        """Adds the services of the trainer's port."""
        server.drain_by(partial(self.runs.drain, self._config.drain_s))
        offer = model_pb2.GetServerCapabilitiesResponse(
            role=model_pb2.SERVICE_ROLE_TRAINER,
            loss_fns=LOSS_FNS,
            features=FEATURES,
            sampler_address=self._config.sampler_address,
        )
        served = ModelServicer(
            lambda: self.groups.description,
            lambda: self.engine.ready,
            offer,
            now=self.group_desk.offered,
        )
        add_model_service(server, served)
        directory = RunDirectory(self.runs, self.table, self._checkpoints.store, self._ids)
        server.add(
            trainer_pb2_grpc.add_TrainerServiceServicer_to_server,
            TrainerServicer(self.runs, directory, self.groups, served.texts),
            "mintrpc.v1.TrainerService",
        )
        server.add(
            checkpoint_pb2_grpc.add_CheckpointServiceServicer_to_server,
            CheckpointServicer(
                self._checkpoints,
                self.groups,
                self._quotas,
                self._ids,
                threads=self._config.threads,
            ),
            "mintrpc.v1.CheckpointService",
        )

    async def start(self) -> None:
        """Starts the engines, and goes on where the journal ends. Raises what keeps them from
        that.
        """
        check_base(self.journal, await self.groups.start())
        self.journal.start()
        self._checkpoints.handoff.start()
        self.runs.start()
        self.groups.feed()
        for name, work in {
            "state's size": self._size.keep_measured(),
            "rows of idle runs": self.services.saved_rows.cover_idle(self.table.all),
            "sweeper": self._checkpoints.sweeper.run(),
        }.items():
            self.tasks.start(work, name)

    async def stop(self) -> None:
        await self.tasks.stop()
        await asyncio.to_thread(self.journal.close)
        await self._checkpoints.handoff.stop()  # the engine writes what is not stored yet
        await self.groups.close()

    def _add_gauges(self, metrics: Metrics) -> None:
        for place in ("device", "host", "disk"):
            metrics.gauge(
                "mint_rows",
                "Training runs whose weights, gradient and moments are there",
                partial(self._rows_in, place),
                place=place,
            )
        metrics.gauge(
            "mint_unstored_snapshots",
            "Snapshots in memory that the store does not have yet",
            lambda: self._checkpoints.handoff.unstored,
        )
        metrics.table(
            "mint_engine_passes",
            "Passes on a GPU, by how they were computed: recorded, or why they were not",
            ["how"],
            partial(self._by_how, "passes"),
        )
        metrics.table(
            "mint_row_fetches",
            "Parts of rows that came to the device: early or late, as the queue had said that they "
            "would be wanted, or when asked for; or unused",
            ["how"],
            partial(self._by_how, "fetches"),
        )
        for name, help, read in _OF_GROUPS:
            metrics.table(name, help, ["group"], partial(self._of_groups, read))
        metrics.gauge("mint_journal_commits", "Transactions on disk", lambda: self.journal.commits)
        metrics.gauge(
            "mint_journal_commit_seconds",
            "Time that they have taken in all",
            lambda: self.journal.commit_seconds,
        )

    def _rows_in(self, place: str) -> float:
        return float(sum(getattr(group.counts.rows, place) for group in self.groups))

    def _by_how(self, what: str) -> Mapping[tuple[str, ...], float]:
        counted = (Counter(getattr(group.counts, what)) for group in self.groups)
        total = sum(counted, Counter[str]())
        return {(how,): float(count) for how, count in total.items()}

    def _of_groups(self, read: Callable[[Group], float]) -> Mapping[tuple[str, ...], float]:
        return {(group.name,): read(group) for group in self.groups}


def _checkpoints(config: TrainerConfig, groups: Groups, metrics: Metrics) -> Checkpoints:
    folder = snapshot_folder(config.snapshot_memory_folder, config.store)
    if folder is None:
        logger.info("no shared memory here: snapshots go through the store")
    store = open_store(
        config.store, config.store_folder, folder, saves=True, quota_bytes=config.store_quota_bytes
    )
    if folder is None:
        return Checkpoints(store, None, groups.store)
    memory = SnapshotMemory(folder, config.snapshot_memory_mib * 2**20)
    metrics.memory_limit("snapshots", lambda: memory.limit_bytes)
    return Checkpoints(store, memory, groups.store)
