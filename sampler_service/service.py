"""The sampler's front: what stands between the servicers and the engine."""

import itertools
import logging
import time
from asyncio import CancelledError

from checkpoint_store import CheckpointStore, SnapshotFolder, snapshot_folder
from mint_core.engine_pipe import ModelDescription
from mint_core.engine_process import EngineProcess
from mint_core.rpc.caller import caller, note
from mint_core.rpc.hosting import RpcServer
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.model_service import ModelServicer, Offer, add_model_service
from mintrpc.v1 import sampler_pb2_grpc
from sampler_service.adapter_rows import AdapterRows
from sampler_service.adapters import Adapters
from sampler_service.config import SamplerConfig
from sampler_service.jobs import Abort, AdapterAbsent, Generate, Generated
from sampler_service.requests import Sampling
from sampler_service.row_files import RowFiles
from sampler_service.servicer import SamplerServicer

logger = logging.getLogger(__name__)

SERVICE = "mintrpc.v1.SamplerService"


class SamplerService:
    """Holds the engine and hands work to it. All methods belong to one event loop."""

    def __init__(self, config: SamplerConfig, metrics: Metrics) -> None:
        self.engine = EngineProcess(
            "sampler_service.engine", config.engine_config(), on_death=self._engine_died
        )
        self._rows = _adapter_rows(config, self.engine)
        self._adapters = Adapters(self._rows, self.engine, capacity=config.max_adapters)
        self._metrics = metrics
        self._tokens = metrics.counter("mint_tokens", "Tokens computed", ["kind"])
        self._model: ModelDescription | None = None
        self._request_ids = itertools.count(1)

    def add_to(self, server: RpcServer) -> None:
        add_model_service(
            server,
            ModelServicer(lambda: self._model, lambda: self.engine.ready, Offer(role="sampler")),
        )
        server.add(
            sampler_pb2_grpc.add_SamplerServiceServicer_to_server, SamplerServicer(self), SERVICE
        )

    async def start(self) -> None:
        self._model = (await self.engine.start()).model

    async def stop(self) -> None:
        await self.engine.close()
        self._rows.close()

    async def model(self) -> ModelDescription:
        """What is served; waits for the engine's first start."""
        return self._model or (await self.engine.hello()).model

    async def generate(self, sampling: Sampling) -> tuple[Generated, str]:
        """Does what is asked for, and says with which revision. Cancelling it stops the work."""
        with self._metrics.queue_depth.track_inprogress():
            while True:
                async with self._adapters.lease(sampling.model_path, caller().tenant) as revision:
                    try:
                        generated = await self._run(sampling, revision)
                    except AdapterAbsent:
                        await self._adapters.settled(revision)
                        continue
                self._count(sampling, generated)
                return generated, revision

    async def _run(self, sampling: Sampling, revision: str) -> Generated:
        job = Generate(
            request_id=next(self._request_ids),
            adapter=revision,
            prompt=sampling.prompt,
            num_samples=sampling.num_samples,
            max_tokens=sampling.max_tokens,
            choice=sampling.choice,
            stops=sampling.stops,
            prompt_logprobs=sampling.prompt_logprobs,
            topk_prompt_logprobs=sampling.topk_prompt_logprobs,
        )
        started_s = time.perf_counter()
        try:
            generated: Generated = await self.engine.call(job)
        except CancelledError:
            self.engine.cast(Abort(job.request_id))
            raise
        note(run_s=time.perf_counter() - started_s)
        return generated

    def _count(self, sampling: Sampling, generated: Generated) -> None:
        sampled = sum(len(c.tokens) for c in generated.continuations)
        self._tokens.labels("prompt").inc(len(sampling.prompt))
        self._tokens.labels("sampled").inc(sampled)
        note(prompt_tokens=len(sampling.prompt), samples=sampling.num_samples, tokens=sampled)

    def _engine_died(self, why: str) -> None:
        self._adapters.engine_died()


def _adapter_rows(config: SamplerConfig, engine: EngineProcess) -> AdapterRows:
    folder = snapshot_folder(config.snapshot_memory_folder, config.store)
    store = CheckpointStore(config.store, SnapshotFolder(folder) if folder else None)
    limit_bytes = config.row_folder_mib * 2**20
    files = RowFiles(config.row_folder or config.store / ".rows", limit_bytes)
    return AdapterRows(store, files, engine)
