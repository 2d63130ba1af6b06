"""The trainer on an engine with rows and no model: `python -m tests.engines.rows_service ...`."""

import sys
from functools import partial

from mint_core.hosting.service_main import run_service
from trainer_service.config import TrainerConfig
from trainer_service.service import TrainerService


def main() -> int:
    build = partial(TrainerService, engine_module="tests.engines.rows")
    return run_service("trainer", TrainerConfig, build)


if __name__ == "__main__":
    sys.exit(main())
