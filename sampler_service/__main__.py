"""`python -m sampler_service`: serves until SIGINT or SIGTERM."""

import sys

from mint_core.hosting.service_config import parse_flags
from mint_core.hosting.service_main import run_service
from sampler_service.config import SamplerConfig
from sampler_service.service import SamplerService


def main() -> int:
    config = parse_flags(
        SamplerConfig,
        sys.argv[1:],
        program="python -m sampler_service",
        summary="Samples from a base model and from LoRA adapters on it.",
    )
    return run_service(config, "sampler", lambda metrics, _: SamplerService(config, metrics))


if __name__ == "__main__":
    sys.exit(main())
