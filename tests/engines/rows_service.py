"""The trainer on an engine with rows and no model: `python -m tests.engines.rows_service ...`."""

import sys

from mint_core.hosting.service_config import parse_flags
from mint_core.hosting.service_main import run_service
from trainer_service.config import TrainerConfig
from trainer_service.service import TrainerService


def main() -> int:
    config = parse_flags(TrainerConfig, sys.argv[1:], program="rows", summary="Trains sums.")
    return run_service(
        config,
        "trainer",
        lambda metrics, keys: TrainerService(config, metrics, keys, "tests.engines.rows"),
    )


if __name__ == "__main__":
    sys.exit(main())
