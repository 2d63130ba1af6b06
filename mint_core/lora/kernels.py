"""Where the Triton kernels run, and what is known of them where Triton is not."""

import torch

TILE = 32  # columns of adapters that are multiplied at once

interpreted = False  # by tests: on a CPU too, in Triton's interpreter


def run_on(device: torch.device) -> bool:
    """Whether kernels compute what is on a device; imports of them come after this."""
    return device.type == "cuda" or interpreted
