"""A real gRPC server for transport faults.

It keeps the contract's order and repeats, computes nothing, and fails attempts as a test says.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from mintrpc.v1 import (
    model_pb2,
    model_pb2_grpc,
    sampler_pb2,
    sampler_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
    types_pb2,
)

WAIT_S = 20.0
Code = grpc.StatusCode
RUN = "run-1"


@dataclass(frozen=True)
class Fault:
    """How an attempt ends. `executed`: the call took effect, only its answer is lost."""

    code: grpc.StatusCode
    reason: str = ""
    message: str = "as the test says"
    retry_after_s: float | None = None
    executed: bool = False


@dataclass(frozen=True)
class Attempt:
    """One arrival of a sequenced call."""

    method: str
    sequence: int
    writer_epoch: int
    acknowledged_sequence: int


@dataclass
class Script:
    """What a test wants, and what has happened."""

    faults: dict[tuple[int, int], Fault] = field(default_factory=dict)  # (sequence, attempt from 1)
    gates: dict[int, threading.Event] = field(default_factory=dict)  # by sequence: answers wait
    attempts: list[Attempt] = field(default_factory=list)
    executed: list[tuple[int, str]] = field(default_factory=list)  # (sequence, method), in order
    requests: dict[int, Any] = field(default_factory=dict)
    opened: int = 0
    # Streams of WatchTrainingRun: events, then a fault or None (it ends); the last one stays open.
    watches: list[tuple[list[Any], Fault | None]] = field(default_factory=list)
    watched: int = 0
    resumed: list[int] = field(default_factory=list)  # behind which events
    watch_left: threading.Event = field(default_factory=threading.Event)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, WAIT_S), "it did not happen"

    def arrived(self, count: int) -> None:
        """Waits for so many attempts."""
        self.wait_until(lambda: len(self.attempts) >= count)


class Trainer(trainer_pb2_grpc.TrainerServiceServicer):
    """One run. A number acts once, in order; an early arrival waits."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._tries: Counter[int] = Counter()
        self._next = 1
        self._epoch = 1

    def CreateTrainingRun(self, request: Any, context: Any) -> Any:
        run = self._run(request.base_model, dict(request.metadata), request.lora_config)
        return trainer_pb2.CreateTrainingRunResponse(training_run=run, writer_epoch=self._epoch)

    def OpenTrainingRun(self, request: Any, context: Any) -> Any:
        with self._script.changed:
            self._epoch += 1
            self._script.opened += 1
            self._script.changed.notify_all()
            return trainer_pb2.OpenTrainingRunResponse(
                training_run=self._run("base", {}, types_pb2.LoraConfig(rank=16)),
                writer_epoch=self._epoch,
                next_sequence=self._next,
            )

    def GetTrainingRun(self, request: Any, context: Any) -> Any:
        run = self._run("base", {}, types_pb2.LoraConfig(rank=16))
        return trainer_pb2.GetTrainingRunResponse(training_run=run)

    def WatchTrainingRun(self, request: Any, context: Any) -> Iterator[Any]:
        script = self._script
        assert request.training_run_id == RUN
        script.watched += 1
        script.resumed.append(request.resume_after)
        if not script.watches:
            context.add_callback(script.watch_left.set)
            yield trainer_pb2.WatchTrainingRunResponse(queue_progress={"waiting_calls": 99})
            script.watch_left.wait(WAIT_S)
            return
        events, fault = script.watches.pop(0)
        yield from events
        if fault is not None:
            refuse(context, fault)

    def Forward(self, request: Any, context: Any) -> Any:
        return self._serve(request, context, "Forward", trainer_pb2.ForwardResponse)

    def ForwardBackward(self, request: Any, context: Any) -> Any:
        return self._serve(request, context, "ForwardBackward", trainer_pb2.ForwardBackwardResponse)

    def OptimStep(self, request: Any, context: Any) -> Any:
        return self._serve(request, context, "OptimStep", trainer_pb2.OptimStepResponse)

    def DiscardGradient(self, request: Any, context: Any) -> Any:
        return self._serve(request, context, "DiscardGradient", trainer_pb2.DiscardGradientResponse)

    def LoadState(self, request: Any, context: Any) -> Any:
        return self._serve(request, context, "LoadState", trainer_pb2.LoadStateResponse)

    def _run(self, base_model: str, metadata: dict[str, str], config: Any) -> Any:
        return trainer_pb2.TrainingRun(
            training_run_id=RUN,
            base_model=base_model,
            metadata=metadata,
            lora_config=config,
            state=trainer_pb2.TrainingRun.STATE_ACTIVE,
            next_sequence=1,
        )

    def _serve(self, request: Any, context: Any, method: str, kind: Any) -> Any:
        fault = self._arrive(request, method)
        if fault is not None and not fault.executed:
            refuse(context, fault)
        self._execute(request, context, method)
        gate = self._script.gates.get(request.sequence)
        assert gate is None or gate.wait(WAIT_S)
        if fault is not None:
            refuse(context, fault, next_sequence=request.sequence + 1)
        if kind in (trainer_pb2.ForwardResponse, trainer_pb2.ForwardBackwardResponse):
            outputs = [trainer_pb2.DatumOutput(logprobs=_logprobs(d)) for d in request.data]
            tokens = sum(len(d.model_input.chunks[0].encoded_text.tokens) for d in request.data)
            metrics = {"loss:sum": float(request.sequence), "tokens:sum": float(tokens)}
            return kind(outputs=outputs, metrics=metrics)
        return kind()

    def _arrive(self, request: Any, method: str) -> Fault | None:
        with self._script.changed:
            self._tries[request.sequence] += 1
            self._script.attempts.append(
                Attempt(
                    method, request.sequence, request.writer_epoch, request.acknowledged_sequence
                )
            )
            self._script.changed.notify_all()
            return self._script.faults.get((request.sequence, self._tries[request.sequence]))

    def _execute(self, request: Any, context: Any, method: str) -> None:
        if request.writer_epoch != self._epoch:
            refuse(context, Fault(Code.ABORTED, "WRITER_FENCED"))
        with self._script.changed:
            self._script.changed.wait_for(lambda: request.sequence <= self._next, WAIT_S)
            if request.sequence == self._next:
                self._next += 1
                self._script.executed.append((request.sequence, method))
                self._script.requests[request.sequence] = request
                self._script.changed.notify_all()


class Model(model_pb2_grpc.ModelServiceServicer):
    def __init__(self, tokenizer: list[model_pb2.GetTokenizerResponse]) -> None:
        self.tokenizer = tokenizer
        self.tokenizer_calls = 0
        self.broken_calls = 0  # so many of them break after their first piece
        self.metadata: list[dict[str, str]] = []
        self.fingerprint = "ab12ab12ab12"
        self.role = model_pb2.SERVICE_ROLE_SAMPLER  # of both: tests sample from the same port
        self.sampler_address = ""
        self.loading = 0  # so many answers tell of no model yet
        self.features = ["list_filters", "export_ttl", "upload_base_model", "prompt_alt_tokens"]

    def GetServerCapabilities(self, request: Any, context: Any) -> Any:
        self.metadata.append(dict(context.invocation_metadata()))
        model = model_pb2.BaseModel(
            name="base", context_length=64, tokenizer_fingerprint=self.fingerprint
        )
        self.loading, loading = max(self.loading - 1, 0), self.loading
        return model_pb2.GetServerCapabilitiesResponse(
            server_version="1",
            role=self.role,
            sampler_address=self.sampler_address,
            base_models=[] if loading else [model],
            features=self.features,
            loss_fns=["cross_entropy", "gspo"],
            limits=model_pb2.Limits(
                max_message_bytes=1 << 20, max_calls_in_flight_per_run=8, max_data_per_request=100
            ),
        )

    def GetTokenizer(self, request: Any, context: Any) -> Iterator[Any]:
        self.tokenizer_calls += 1
        if self.tokenizer_calls <= self.broken_calls:
            yield self.tokenizer[0]
            refuse(context, Fault(Code.UNAVAILABLE))
        yield from self.tokenizer


class Sampler(sampler_pb2_grpc.SamplerServiceServicer):
    """Answers with the seed; holds requests that ask for 13 tokens until they are cancelled."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.arrived_s: list[float] = []  # when each request came
        # Streams of StreamSample: messages, then a fault or None (it ends); later ones stay open.
        self.streams: list[tuple[list[Any], Fault | None]] = []
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self.refused = threading.Event()
        self.fail_first: Fault | None = None

    def StreamSample(self, request: Any, context: Any) -> Iterator[Any]:
        self._note(request)
        messages, fault = self.streams.pop(0) if self.streams else ([], None)
        for message in messages:
            message.seed = message.seed or request.sample.sampling_params.seed
            message.revision_path = message.revision_path or request.sample.model_path
            yield message
        if fault is not None:
            refuse(context, fault)
        if not messages:
            context.add_callback(self.cancelled.set)
            self.started.set()
            yield sampler_pb2.StreamSampleResponse(
                tokens=[1], seed=request.sample.sampling_params.seed
            )
            self.cancelled.wait(WAIT_S)

    def _note(self, request: Any) -> None:
        self.requests.append(request)
        self.arrived_s.append(time.monotonic())

    def Sample(self, request: Any, context: Any) -> Any:
        self._note(request)
        if self.fail_first and len(self.requests) == 1:
            self.refused.set()
            refuse(context, self.fail_first)
        if request.sampling_params.max_tokens == 13:
            context.add_callback(self.cancelled.set)
            self.started.set()
            self.cancelled.wait(WAIT_S)
        sequence = sampler_pb2.SampledSequence(
            tokens=[1, 2], logprobs=[-0.5, -1.0], stop_reason=sampler_pb2.STOP_REASON_STOP
        )
        return sampler_pb2.SampleResponse(
            sequences=[sequence] * request.num_samples, seed=request.sampling_params.seed
        )

    def ComputeLogprobs(self, request: Any, context: Any) -> Any:
        count = sum(len(chunk.encoded_text.tokens) for chunk in request.prompt.chunks)
        path = f"{request.model_path}@7" if request.model_path else ""
        return sampler_pb2.ComputeLogprobsResponse(
            logprobs=[float("nan")] + [-1.0] * (count - 1), revision_path=path
        )


@dataclass
class Server:
    """A running server and its parts."""

    address: str
    script: Script
    model: Model
    sampler: Sampler
    grpc_server: grpc.Server


@contextmanager
def running(
    script: Script | None = None,
    *,
    address: str = "127.0.0.1:0",
    tokenizer: list[model_pb2.GetTokenizerResponse] | None = None,
) -> Iterator[Server]:
    script = script or Script()
    options = [("grpc.so_reuseport", 0)]
    server = grpc.server(ThreadPoolExecutor(max_workers=64), options=options)
    model, sampler = Model(tokenizer or []), Sampler()
    trainer_pb2_grpc.add_TrainerServiceServicer_to_server(Trainer(script), server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(model, server)
    sampler_pb2_grpc.add_SamplerServiceServicer_to_server(sampler, server)
    port = server.add_insecure_port(address)
    server.start()
    try:
        yield Server(f"127.0.0.1:{port}", script, model, sampler, server)
    finally:
        for gate in script.gates.values():
            gate.set()
        sampler.cancelled.set()
        script.watch_left.set()
        server.stop(0).wait(WAIT_S)


def _logprobs(datum: Any) -> types_pb2.TensorData:
    """0, 1, 2, ... in the shape of the targets."""
    shape = datum.loss_fn_inputs["target_tokens"].shape
    values = np.arange(np.prod(shape, dtype=np.int64), dtype="<f4").tobytes()
    dtype = types_pb2.TENSOR_DTYPE_FLOAT32
    return types_pb2.TensorData(dtype=dtype, shape=shape, values=values)


def refuse(context: Any, fault: Fault, **metadata: object) -> None:
    """Ends an RPC as the contract says, or as gRPC itself does if the fault has no reason."""
    details = []
    if fault.reason:
        texts = {key: str(value) for key, value in metadata.items()}
        info = error_details_pb2.ErrorInfo(reason=fault.reason, domain="mint", metadata=texts)
        details.append(info)
    if fault.retry_after_s is not None:
        delay = Duration(nanos=round(fault.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = [AnyMessage() for _ in details]
    for holder, detail in zip(packed, details, strict=True):
        holder.Pack(detail)
    status = status_pb2.Status(code=fault.code.value[0], message=fault.message, details=packed)
    context.abort_with_status(rpc_status.to_status(status))
