"""What the trainer can be told at start."""

from dataclasses import dataclass

from mint_core.service_config import ServiceConfig, option
from trainer_service.jobs import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig(ServiceConfig):
    address: str = option("127.0.0.1:50051", "HOST:PORT to listen on; port 0: one that is free")
    metrics_address: str = option(
        "127.0.0.1:9051",
        "HOST:PORT of the Prometheus metrics; port 0: one that is free; empty: none",
    )
    sampler_address: str = option(
        "",
        "HOST:PORT of the sampler that shares the store, for clients; empty: the same host, port "
        "50052",
    )
    max_batch_tokens: int = option(
        0, "most tokens of one pass through the base model; 0: computed from free memory"
    )
    gap_s: float = option(
        60.0, "how long a call that came before an earlier one is held, in seconds"
    )
    queue_calls: int = option(
        1024,
        "most calls of one tenant (without `keys`: of one run) that wait for their answers; more "
        "are told to come again, which clients do by themselves",
    )
    queue_tokens: int = option(
        2_000_000,
        "the same in tokens: a call is taken while fewer than these wait, of whatever size it is",
    )

    def __post_init__(self) -> None:
        ServiceConfig.__post_init__(self)
        if self.max_batch_tokens < 0:
            raise ValueError(
                f"`max_batch_tokens` must not be negative, got {self.max_batch_tokens}"
            )
        if not 0 < self.gap_s < float("inf"):
            raise ValueError(f"`gap_s` must be positive and finite, got {self.gap_s}")
        for name, value in (("queue_calls", self.queue_calls), ("queue_tokens", self.queue_tokens)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")

    def engine_config(self) -> EngineConfig:
        return EngineConfig(
            base_model=self.base_model,
            base_model_name=self.base_model_name,
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
            max_lora_rank=self.max_lora_rank,
            max_batch_tokens=self.max_batch_tokens,
            log_level=self.log_level,
        )
