"""The trainer on an engine with ways to die: `python -m tests.engines.mortal_service ...`."""

import sys
from typing import Any

from mint_core.hosting.service_main import run_service
from tests.engines import bad_store
from trainer_service.config import TrainerConfig
from trainer_service.service import TrainerService


def build(config: TrainerConfig, *parts: Any) -> TrainerService:
    bad_store.install(config.store)
    return TrainerService(config, *parts, engine_module="tests.engines.mortal")


def main() -> int:
    return run_service("trainer", TrainerConfig, build)


if __name__ == "__main__":
    sys.exit(main())
