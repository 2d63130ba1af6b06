"""`python -m trainer_service --base-model FOLDER`: serves until SIGINT or SIGTERM."""

import sys

from mint_core.hosting.service_config import parse_flags
from mint_core.hosting.service_main import run_service
from trainer_service.config import TrainerConfig
from trainer_service.service import TrainerService


def main() -> int:
    config = parse_flags(
        TrainerConfig,
        sys.argv[1:],
        program="python -m trainer_service",
        summary="Trains LoRA adapters on one frozen base model, over gRPC.",
    )
    return run_service(
        config, "trainer", lambda metrics, keys: TrainerService(config, metrics, keys)
    )


if __name__ == "__main__":
    sys.exit(main())
