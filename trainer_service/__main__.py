"""`python -m trainer_service`: serves until SIGINT or SIGTERM."""

import sys

from mint_core.hosting.service_main import run_service
from trainer_service.config import TrainerConfig
from trainer_service.service import TrainerService


def main() -> int:
    return run_service("trainer", TrainerConfig, TrainerService)


if __name__ == "__main__":
    sys.exit(main())
