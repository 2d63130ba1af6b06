"""`python -m sampler_service`: serves until SIGINT or SIGTERM."""

import sys

from mint_core.hosting.service_main import run_service
from sampler_service.config import SamplerConfig
from sampler_service.service import SamplerService


def main() -> int:
    return run_service(
        "sampler", SamplerConfig, lambda config, metrics, *_: SamplerService(config, metrics)
    )


if __name__ == "__main__":
    sys.exit(main())
