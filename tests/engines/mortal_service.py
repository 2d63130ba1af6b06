"""The trainer on an engine with ways to die: `python -m tests.engines.mortal_service ...`."""

import sys

from mint_core.hosting.service_config import parse_flags
from mint_core.hosting.service_main import run_service
from tests.engines import bad_store
from trainer_service.config import TrainerConfig
from trainer_service.service import TrainerService


def main() -> int:
    config = parse_flags(TrainerConfig, sys.argv[1:], program="mortal", summary="Trains.")
    bad_store.install(config.store)
    return run_service(
        config,
        "trainer",
        lambda metrics, keys: TrainerService(config, metrics, keys, "tests.engines.mortal"),
    )


if __name__ == "__main__":
    sys.exit(main())
