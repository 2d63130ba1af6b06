"""What the trainer answers, and what a server says of itself."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Self

from mint.types._from_proto import FromMessage, known, read
from mint.types.params import LoraConfig
from mint.types.tensor_data import TensorData
from mintrpc.v1 import model_pb2, trainer_pb2

# Where a run's weights come from: "uploaded" ones are not trained themselves.
RunKind = Literal["trained", "uploaded"]


@dataclass(frozen=True, slots=True)
class ForwardBackwardOutput:
    """Per datum, in order, the logprobs of its targets; and metrics, such as `loss:sum`.

    `loss_fn_output_type` is the name of the loss.
    """

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float]

    @classmethod
    def from_proto(
        cls,
        message: trainer_pb2.ForwardResponse | trainer_pb2.ForwardBackwardResponse,
        loss_fn: str,
    ) -> Self:
        outputs = [{"logprobs": TensorData.from_proto(out.logprobs)} for out in message.outputs]
        return cls(loss_fn, outputs, dict(message.metrics))


@dataclass(frozen=True, slots=True)
class OptimStepResponse:
    """`step` counts the steps taken so far. Metrics: `grad_norm:mean`, the norm of the whole
    gradient before clipping, the same as `unclipped_grad_l2:mean`, and `learning_rate:mean`, the
    rate of this step.
    """

    metrics: dict[str, float]
    step: int

    @classmethod
    def from_proto(cls, message: trainer_pb2.OptimStepResponse) -> Self:
        metrics = dict(message.metrics)
        if (norm := metrics.get("grad_norm:mean")) is not None:
            metrics["unclipped_grad_l2:mean"] = norm  # as scripts for Tinker read it
        return cls(metrics, message.step)


@dataclass(frozen=True, slots=True)
class DiscardGradientResponse(FromMessage):
    """Whether there was a gradient to discard."""

    gradient_discarded: bool


@dataclass(frozen=True, slots=True)
class SaveWeightsResponse(FromMessage):
    """`path` names the newest revision of the name, `revision_path` the saved one for good."""

    path: str
    revision_path: str
    step: int
    gradient_pending: bool


@dataclass(frozen=True, slots=True)
class SaveWeightsForSamplerResponse(FromMessage):
    """`path` names the newest revision of the name, `revision_path` the saved one for good."""

    path: str
    revision_path: str
    step: int


@dataclass(frozen=True, slots=True)
class LoadWeightsResponse(FromMessage):
    """`step` is that of the loaded state, 0 without optimizer."""

    step: int
    revision_path: str
    gradient_discarded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """A run as the server describes it."""

    training_run_id: str
    base_model: str
    base_fingerprint: str
    lora_config: LoraConfig
    metadata: dict[str, str]
    create_time: datetime
    update_time: datetime
    step: int
    next_sequence: int
    gradient_pending: bool
    state: str  # "active" or "failed"
    state_message: str
    trainable_parameter_count: int
    trained_modules: list[str]
    isolated: bool
    kind: RunKind = "trained"
    inexact_replay_count: int = 0  # how often it was restored to other bits than before
    group: str = ""  # of the trainer's engines, that which has it; empty: the server does not say

    @classmethod
    def from_proto(cls, message: trainer_pb2.TrainingRun) -> Self:
        return read(
            cls,
            message,
            lora_config=LoraConfig.from_proto(message.lora_config),
            state=known(trainer_pb2.TrainingRun.State, message.state, "the run is in state"),
            kind="uploaded" if message.kind == message.KIND_UPLOADED else "trained",
        )

    @property
    def lora_rank(self) -> int:
        """Rank of its adapter."""
        return self.lora_config.rank

    # The names of the same in Tinker's SDK.

    @property
    def is_lora(self) -> bool:
        """True: every run is."""
        return True

    @property
    def corrupted(self) -> bool:
        """Whether its weights are lost."""
        return self.state == "failed"

    @property
    def last_request_time(self) -> datetime:
        """The same as `update_time`."""
        return self.update_time

    @property
    def user_metadata(self) -> dict[str, str]:
        """The same as `metadata`."""
        return self.metadata


@dataclass(frozen=True, slots=True)
class ListTrainingRunsResponse:
    """One page of runs, newest first. `next_page_token` is empty at the end; `total_size` counts
    the runs of all pages.
    """

    training_runs: list[TrainingRun]
    next_page_token: str
    total_size: int = 0

    @classmethod
    def from_proto(cls, message: trainer_pb2.ListTrainingRunsResponse) -> Self:
        runs = [TrainingRun.from_proto(run) for run in message.training_runs]
        return read(cls, message, training_runs=runs)


@dataclass(frozen=True, slots=True)
class ModelData:
    """The base model behind a training client."""

    model_name: str
    tokenizer_id: str
    arch: str | None = None


@dataclass(frozen=True, slots=True)
class GetInfoResponse:
    """What a training client trains."""

    model_data: ModelData
    model_id: str
    is_lora: bool
    lora_rank: int
    model_name: str
    training_run: TrainingRun

    @classmethod
    def from_run(cls, run: TrainingRun) -> "GetInfoResponse":
        data = ModelData(model_name=run.base_model, tokenizer_id=run.base_model)
        return cls(data, run.training_run_id, True, run.lora_rank, run.base_model, run)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportedModel:
    """A base model that a server serves."""

    model_name: str
    max_context_length: int
    vocabulary_size: int
    max_lora_rank: int
    fingerprint: str
    dtype: str
    device: str
    tokenizer_fingerprint: str
    eos_token_ids: list[int]
    text_only: bool
    expert_layers: int = 0  # that have experts; 0: none, and so the next
    experts: int = 0  # of such a layer
    experts_per_token: int = 0

    @classmethod
    def from_proto(cls, message: model_pb2.BaseModel) -> Self:
        return read(
            cls, message, model_name=message.name, max_context_length=message.context_length
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits(FromMessage):
    """What a client must not exceed. 0: the server does not say."""

    max_message_bytes: int
    max_data_per_request: int
    max_calls_in_flight_per_run: int
    max_samples_per_request: int
    max_topk_logprobs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GetServerCapabilitiesResponse:
    """What a server can do."""

    supported_models: list[SupportedModel]
    server_version: str
    role: str  # "trainer" or "sampler"
    loss_fns: list[str]
    limits: Limits
    sampler_address: str
    bitwise_reproducible: bool
    bits_traded_for_speed: bool
    features: list[str]
    engine_ready: bool

    @classmethod
    def from_proto(cls, message: model_pb2.GetServerCapabilitiesResponse) -> Self:
        return read(
            cls,
            message,
            supported_models=[SupportedModel.from_proto(model) for model in message.base_models],
            role="sampler" if message.role == model_pb2.SERVICE_ROLE_SAMPLER else "trainer",
            limits=Limits.from_proto(message.limits),
        )
