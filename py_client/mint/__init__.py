"""Training and sampling of LoRA adapters on servers of your own.

service = mint.ServiceClient()
training = service.create_lora_training_client(base_model="Qwen/Qwen3-0.6B", rank=16)
training.forward_backward(data, loss_fn="cross_entropy")
training.optim_step(types.AdamParams(learning_rate=1e-4)).result()
"""

import importlib
from types import ModuleType

from mint import _forks as _forks  # before all that imports gRPC
from mint import types
from mint._run.watch import RunWatch
from mint._sampling.sample_stream import SampleStream
from mint._version import __tinker_version__, __version__
from mint.errors import (
    APIConnectionError,
    APIError,
    APIResponseValidationError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    InternalServerError,
    InvalidInputError,
    MintError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestFailedError,
    TinkerError,
    UnprocessableEntityError,
)
from mint.futures import APIFuture, SampleFuture
from mint.rest_client import RestClient
from mint.sampling_client import SamplingClient
from mint.service_client import ServiceClient
from mint.training_client import TrainingClient
from mint.types import (
    AdamParams,
    Checkpoint,
    CheckpointType,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    LoraConfig,
    ModelID,
    ModelInput,
    ModelInputChunk,
    OptimStepResponse,
    ParsedCheckpointPath,
    ParsedCheckpointTinkerPath,
    SampledSequence,
    SamplePart,
    SampleResponse,
    SamplingParams,
    StopReason,
    TensorData,
    TensorDtype,
    TrainingRun,
)

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIFuture",
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AdamParams",
    "AuthenticationError",
    "BadRequestError",
    "Checkpoint",
    "CheckpointType",
    "ConflictError",
    "Datum",
    "EncodedTextChunk",
    "ForwardBackwardOutput",
    "InternalServerError",
    "InvalidInputError",
    "LoraConfig",
    "MintError",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "NotFoundError",
    "OptimStepResponse",
    "ParsedCheckpointPath",
    "ParsedCheckpointTinkerPath",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestFailedError",
    "RestClient",
    "RunWatch",
    "SampleFuture",
    "SamplePart",
    "SampleResponse",
    "SampleStream",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "StopReason",
    "TensorData",
    "TensorDtype",
    "TinkerError",
    "TrainingClient",
    "TrainingRun",
    "UnprocessableEntityError",
    "__tinker_version__",
    "__version__",
    "types",
]


def __getattr__(name: str) -> ModuleType:
    """Other names for what is here, imported when asked for."""
    if name in ("mint", "recipe", "renderers", "tinker"):
        return importlib.import_module(f"mint.{name}")
    raise AttributeError(f"module 'mint' has no attribute {name!r}")
