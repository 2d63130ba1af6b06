"""Where the Triton kernels run."""

import torch

interpreted = False  # by tests: on a CPU too, in Triton's interpreter


def run_on(device: torch.device) -> bool:
    """Whether kernels compute what is on a device; imports of them come after this."""
    return device.type == "cuda" or interpreted
