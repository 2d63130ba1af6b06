"""The sampler's front: what stands between the servicers and the engine."""

import itertools
from collections.abc import Sequence

from checkpoint_store import AdapterStore, open_store, snapshot_folder
from mint_core.backlog import Load
from mint_core.engine_host.pipe import ModelDescription
from mint_core.engine_host.process import EngineProcess
from mint_core.hosting.engine_hosts import engine_hosts
from mint_core.hosting.tasks import Tasks
from mint_core.rpc.hosting import RpcServer
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.model_service import ModelServicer, add_model_service
from mintrpc.v1 import model_pb2, sampler_pb2_grpc
from sampler_service.adapters.leases import AdapterLeases
from sampler_service.adapters.revisions import Revisions
from sampler_service.adapters.row_folder import RowFolder
from sampler_service.config import SamplerConfig
from sampler_service.constraint_parsing import constraints_served
from sampler_service.execution import Execution
from sampler_service.job_files import job_files
from sampler_service.replicas.desk import ReplicaDesk
from sampler_service.replicas.replica import Replica
from sampler_service.replicas.replicas import Replicas
from sampler_service.replicas.watching import watch_replicas
from sampler_service.servicer import SamplerServicer
from sampler_service.streams import Streams
from sampler_service.waiting_room import WaitingRoom
from sampler_service.wire_store.wire_store import open_wire_store

SERVICE = "mintrpc.v1.SamplerService"
FEATURES = (
    "texts",
    "admin",
    "stream_sample",
    "resume_stream_sample",
    "replicas",
    "typed_tensors",
    "routed_experts",
    "prefix_cache",
    "min_p",
    "penalties",
    "topk_sample_logprobs",
    "target_prompt_logprobs",
    "prompt_alt_tokens",
    "prompt_logprobs_last_n",
    *(("constraints",) if constraints_served() else ()),
)


class SamplerService:
    """Holds the engines and hands work to them. All methods belong to one event loop."""

    def __init__(self, config: SamplerConfig, metrics: Metrics) -> None:
        self._config = config
        self._hosts = engine_hosts(config, job_files, config.row_folders, count=config.replicas)
        self._engines_made = itertools.count()
        self.engine = Replicas()
        self.tasks = Tasks()
        self._revisions = _revisions(config, self.engine, self.tasks)
        for number in range(config.replicas):
            self.engine.add(self._replica(str(number), config.of_replica(number)))
        self.replica_desk = ReplicaDesk(self.engine, self._another, self.tasks)
        watch_replicas(metrics, self.engine)
        share = Load(count=config.queue_samples, tokens=config.queue_tokens)
        self._execution = Execution(
            self.engine,
            self._revisions,
            WaitingRoom(share),
            metrics,
            max_wait_s=config.max_wait_s,
        )
        self._streams = Streams(self._execution, metrics)

    def add_to(self, server: RpcServer) -> None:
        offer = model_pb2.GetServerCapabilitiesResponse(
            role=model_pb2.SERVICE_ROLE_SAMPLER, features=FEATURES
        )
        served = ModelServicer(
            lambda: self.engine.model, lambda: self.engine.ready, offer, now=self._replicas_now
        )
        add_model_service(server, served)
        server.add(
            sampler_pb2_grpc.add_SamplerServiceServicer_to_server,
            SamplerServicer(self._model, self._execution, self._streams, served.texts),
            SERVICE,
        )

    async def start(self) -> None:
        await self.engine.start(self.tasks)

    async def stop(self) -> None:
        self._streams.stop()
        self._revisions.interrupt()
        await self.tasks.stop()
        await self.engine.close()
        self._revisions.close()

    def _replica(self, name: str, config: SamplerConfig) -> Replica:
        host = self._hosts(next(self._engines_made))
        engine = EngineProcess("sampler_service.engine", config, host)
        capacity = config.max_adapters
        leases = AdapterLeases(self._revisions, engine, self.tasks, capacity=capacity)
        return Replica(name, engine, leases, config.device)

    def _another(self, name: str, device: str, others: Sequence[str]) -> Replica:
        return self._replica(name, self._config.beside(others, device))

    async def _model(self) -> ModelDescription:
        """What is served; waits for the first start of an engine."""
        return self.engine.model or (await self.engine.hello()).model

    def _replicas_now(self) -> model_pb2.GetServerCapabilitiesResponse:
        staying = sum(not each.leaving for each in self.engine)
        return model_pb2.GetServerCapabilitiesResponse(
            replicas=staying, replicas_ready=len(self.engine.up)
        )


def _revisions(config: SamplerConfig, engine: Replicas, tasks: Tasks) -> Revisions:
    store: AdapterStore
    if access := config.trainer_access():
        store = open_wire_store(access, config.store_folder)
    else:
        snapshots = snapshot_folder(config.snapshot_memory_folder, config.store)
        store = open_store(config.store, config.store_folder, snapshots, saves=False)
    limit_bytes = config.row_folder_mib * 2**20
    folder = RowFolder(config.copy_folder, limit_bytes)
    return Revisions(store, folder, engine, tasks)
