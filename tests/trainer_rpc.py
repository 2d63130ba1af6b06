"""Training calls over the bare stubs, for tests of the contract itself."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from mintrpc.v1 import trainer_pb2, trainer_pb2_grpc, types_pb2

CALL_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as a caller of any language sees it."""

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: Mapping[str, str]
    field: str
    retry_after_s: float | None
    next_sequence: int | None  # of the outcome of a number
    details: bytes  # all of it, as it came


# Neither is the call recorded nor is its number free: another call has it, or the run is lost.
TAKEN = ("SEQUENCE_REUSED", "ANSWER_ACKNOWLEDGED", "ANSWER_DROPPED", "TRAINING_RUN_LOST")


def refusal(error: grpc.RpcError) -> Refusal:
    status: status_pb2.Status = rpc_status.from_call(error)
    info, bad, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    has_retry = False
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
        has_retry = detail.Unpack(retry) or has_retry
    assert info.domain == "mint"
    metadata = dict(info.metadata)
    next_sequence = metadata.pop("next_sequence", None)
    trailers = dict(error.trailing_metadata())
    return Refusal(
        code=error.code(),
        message=status.message,
        reason=info.reason,
        metadata=metadata,
        field=bad.field_violations[0].field if bad.field_violations else "",
        retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if has_retry else None,
        next_sequence=None if next_sequence is None else int(next_sequence),
        details=trailers["grpc-status-details-bin"],
    )


def refused(call: Any, request: Any, **options: Any) -> Refusal:
    """Sends a request that must be refused."""
    try:
        answer = call(request, timeout=CALL_LIMIT_S, **options)
    except grpc.RpcError as error:
        return refusal(error)
    raise AssertionError(f"not refused, but answered {answer}")


def tensor(values: Sequence[float], dtype: str) -> types_pb2.TensorData:
    array = np.array(values, {"int64": "<i8", "float32": "<f4", "int32": "<i4"}[dtype])
    return types_pb2.TensorData(
        dtype=types_pb2.TensorDtype.Value(f"TENSOR_DTYPE_{dtype.upper()}"),
        shape=array.shape,
        values=array.tobytes(),
    )


def floats(data: types_pb2.TensorData) -> list[float]:
    assert data.dtype == types_pb2.TENSOR_DTYPE_FLOAT32
    return np.frombuffer(data.values, "<f4").reshape(tuple(data.shape)).tolist()


def model_input(tokens: Sequence[int]) -> types_pb2.ModelInput:
    chunk = types_pb2.ModelInputChunk(encoded_text=types_pb2.EncodedTextChunk(tokens=tokens))
    return types_pb2.ModelInput(chunks=[chunk])


def datum(
    tokens: Sequence[int],
    weights: Sequence[float] | types_pb2.TensorData | None = None,
    **inputs: types_pb2.TensorData,
) -> types_pb2.Datum:
    """A sequence whose targets are the tokens that follow."""
    inputs.setdefault("target_tokens", tensor(tokens[1:], "int64"))
    if isinstance(weights, types_pb2.TensorData):
        inputs["weights"] = weights
    elif weights is not None:
        inputs["weights"] = tensor(weights, "float32")
    return types_pb2.Datum(model_input=model_input(tokens[:-1]), loss_fn_inputs=inputs)


def lora_config(rank: int = 4, seed: int = 1, **options: Any) -> types_pb2.LoraConfig:
    return types_pb2.LoraConfig(rank=rank, seed=seed, **options)


def create_request(**options: Any) -> trainer_pb2.CreateTrainingRunRequest:
    options.setdefault("request_id", uuid.uuid4().hex)
    if "checkpoint" not in options:
        options.setdefault("lora_config", lora_config())
    return trainer_pb2.CreateTrainingRunRequest(**options)


@dataclass(slots=True)
class RawRun:
    """A run and its next number. Methods make requests; `send` sends one and waits."""

    stub: trainer_pb2_grpc.TrainerServiceStub
    run: trainer_pb2.TrainingRun
    writer_epoch: int
    next_sequence: int = 1
    options: dict[str, Any] = field(default_factory=dict)  # of every call, such as metadata

    @property
    def id(self) -> str:
        return self.run.training_run_id

    def place(self, sequence: int | None = None) -> dict[str, Any]:
        if sequence is None:
            sequence = self.next_sequence
            self.next_sequence += 1
        return {
            "training_run_id": self.id,
            "sequence": sequence,
            "writer_epoch": self.writer_epoch,
        }

    def forward_backward(
        self, *data: types_pb2.Datum, sequence: int | None = None, **options: Any
    ) -> trainer_pb2.ForwardBackwardRequest:
        if not any(name in options for name in ("importance_sampling", "ppo", "cispo", "dro")):
            options.setdefault("cross_entropy", types_pb2.CrossEntropy())
        return trainer_pb2.ForwardBackwardRequest(
            **self.place(sequence) | options, data=data or [datum([5, 6, 7, 8])]
        )

    def forward(
        self, *data: types_pb2.Datum, sequence: int | None = None, **options: Any
    ) -> trainer_pb2.ForwardRequest:
        options.setdefault("cross_entropy", types_pb2.CrossEntropy())
        return trainer_pb2.ForwardRequest(
            **self.place(sequence) | options, data=data or [datum([5, 6, 7, 8])]
        )

    def optim_step(
        self, sequence: int | None = None, **options: Any
    ) -> trainer_pb2.OptimStepRequest:
        return trainer_pb2.OptimStepRequest(**self.place(sequence) | options)

    def discard(
        self, sequence: int | None = None, **options: Any
    ) -> trainer_pb2.DiscardGradientRequest:
        return trainer_pb2.DiscardGradientRequest(**self.place(sequence) | options)

    def save_state(self, name: str, **options: Any) -> trainer_pb2.SaveStateRequest:
        return trainer_pb2.SaveStateRequest(**self.place() | options, name=name)

    def save_for_sampler(
        self, name: str = "", **options: Any
    ) -> trainer_pb2.SaveWeightsForSamplerRequest:
        return trainer_pb2.SaveWeightsForSamplerRequest(**self.place() | options, name=name)

    def load_state(self, path: str, **options: Any) -> trainer_pb2.LoadStateRequest:
        return trainer_pb2.LoadStateRequest(**self.place() | options, path=path)

    def send(self, request: Any) -> Any:
        return self._method(request)(request, timeout=CALL_LIMIT_S, **self.options)

    def start(self, request: Any) -> Any:
        """Sends without waiting. The future that it returns must be kept: one that is dropped
        cancels the call, perhaps before it was sent."""
        return self._method(request).future(request, timeout=CALL_LIMIT_S, **self.options)

    def refused(self, request: Any) -> Refusal:
        """Sends a request that must be refused, and once more if that is its outcome."""
        error = refused(self._method(request), request, **self.options)
        if error.next_sequence is not None:
            assert error.next_sequence == request.sequence + 1
            assert refused(self._method(request), request, **self.options) == error
        elif error.reason not in TAKEN and error.code is not grpc.StatusCode.NOT_FOUND:
            assert request.sequence < 1 or self.describe().next_sequence <= request.sequence
        return error

    def wait_until_accepted(self, sequence: int) -> None:
        """Waits until the call with this number has its place in the run."""
        deadline = time.monotonic() + CALL_LIMIT_S
        while self.describe().next_sequence <= sequence:
            assert time.monotonic() < deadline, f"call {sequence} was never accepted"

    def describe(self) -> trainer_pb2.TrainingRun:
        request = trainer_pb2.GetTrainingRunRequest(training_run_id=self.id)
        return self.stub.GetTrainingRun(request, timeout=CALL_LIMIT_S, **self.options).training_run

    def _method(self, request: Any) -> Any:
        return getattr(self.stub, type(request).__name__.removesuffix("Request"))


def create(
    stub: trainer_pb2_grpc.TrainerServiceStub, options: dict[str, Any] | None = None, **request: Any
) -> RawRun:
    """Makes a run."""
    options = options or {}
    answer = stub.CreateTrainingRun(create_request(**request), timeout=CALL_LIMIT_S, **options)
    return RawRun(stub, answer.training_run, answer.writer_epoch, options=options)
