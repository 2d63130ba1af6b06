"""Values that go into calls and come out of them: plain, immutable, without protobuf."""

from typing import Literal

from mint.types.checkpoints import (
    Checkpoint,
    CheckpointFile,
    CheckpointsListResponse,
    CheckpointType,
    Cursor,
    ExportResponse,
    ParsedCheckpointPath,
    TrainingRunsResponse,
    WeightsInfoResponse,
)
from mint.types.datum import Datum
from mint.types.model_input import (
    EncodedTextChunk,
    ImageAssetPointerChunk,
    ImageChunk,
    ModelInput,
    ModelInputChunk,
)
from mint.types.params import AdamParams, LoraConfig, SamplingParams
from mint.types.responses import (
    DiscardGradientResponse,
    ForwardBackwardOutput,
    GetInfoResponse,
    GetServerCapabilitiesResponse,
    Limits,
    ListTrainingRunsResponse,
    LoadWeightsResponse,
    ModelData,
    OptimStepResponse,
    RunKind,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    SupportedModel,
    TrainingRun,
)
from mint.types.run_events import CallOutcome, QueueProgress, RunEvent
from mint.types.samples import (
    PromptAltTokens,
    SampledSequence,
    SamplePart,
    SampleResponse,
    StopReason,
    Topk,
    TopkLogprobs,
)
from mint.types.tensor_data import TensorData, TensorDtype

ForwardBackwardResult = ForwardBackwardOutput
LossFnType = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"]
ModelID = str
ParsedCheckpointTinkerPath = ParsedCheckpointPath

__all__ = [
    "AdamParams",
    "CallOutcome",
    "Checkpoint",
    "CheckpointFile",
    "CheckpointType",
    "CheckpointsListResponse",
    "Cursor",
    "Datum",
    "DiscardGradientResponse",
    "EncodedTextChunk",
    "ExportResponse",
    "ForwardBackwardOutput",
    "ForwardBackwardResult",
    "GetInfoResponse",
    "GetServerCapabilitiesResponse",
    "ImageAssetPointerChunk",
    "ImageChunk",
    "Limits",
    "ListTrainingRunsResponse",
    "LoadWeightsResponse",
    "LoraConfig",
    "LossFnType",
    "ModelData",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "OptimStepResponse",
    "ParsedCheckpointPath",
    "ParsedCheckpointTinkerPath",
    "PromptAltTokens",
    "QueueProgress",
    "RunEvent",
    "RunKind",
    "SamplePart",
    "SampleResponse",
    "SampledSequence",
    "SamplingParams",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsResponse",
    "StopReason",
    "SupportedModel",
    "TensorData",
    "TensorDtype",
    "Topk",
    "TopkLogprobs",
    "TrainingRun",
    "TrainingRunsResponse",
    "WeightsInfoResponse",
]
