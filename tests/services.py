"""Both services side by side, as tests see them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers import running_sampler, running_trainer

SERVED_NAME = "Qwen/Qwen3-0.6B"


@dataclass(frozen=True, slots=True)
class Services:
    """Where they listen, and what they share."""

    trainer: str  # HOST:PORT
    sampler: str  # HOST:PORT
    store: Path
    model: Path

    def point_environment_at_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("MINT_API_KEY", "MINT_BASE_MODEL", "MINT_LORA_RANK"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("MINT_BASE_URL", self.trainer)
        monkeypatch.setenv("MINT_SAMPLER_URL", self.sampler)


@contextmanager
def running_services(
    model: Path, store: Path, *, name: str = SERVED_NAME, **sampler_flags: object
) -> Iterator[Services]:
    with (
        running_sampler(model, store, base_model_name=name, **sampler_flags) as sampler,
        running_trainer(
            model, store, base_model_name=name, sampler_address=sampler.address
        ) as trainer,
    ):
        yield Services(trainer.address, sampler.address, store, model)
