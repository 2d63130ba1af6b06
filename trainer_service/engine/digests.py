"""The digest of a part of a row, wherever the part is: mint_core/lora/row_digest.py says which."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from mint_core.lora import row_digest


def digest(vector: Tensor) -> int:  # [params] float32 -> 0 .. 2^64 - 1
    """The digest of a part of a row."""
    if vector.is_cpu:
        return row_digest.digest(vector.numpy())
    from trainer_service.engine.digest_kernel import block_sums  # Triton is not everywhere

    words = vector.view(torch.int64)  # rows are of multiples of 8
    sums = block_sums(words, factors(vector.device))
    return row_digest.combined(len(vector), sums.tolist())  # a GPU is waited for only here


@cache
def factors(device: torch.device) -> Tensor:  # [block]
    return torch.from_numpy(row_digest.FACTORS.view(np.int64)).to(device)
