"""Whose fault an exception in an engine is: a call's, which then ends alone, or the engine's."""

import re

import torch

from mint_core.errors import MintError

_KINDS = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
# How torch, its libraries and drivers speak of memory or the device, where they have no class.
_WORDS = re.compile("cuda|cublas|cudnn|triton|memory|alloc", re.IGNORECASE)


def ends_the_engine(error: Exception) -> bool:
    """Whether memory or the device has failed. What is computed after that is not to be trusted,
    and no call is to blame: the front starts another engine, has all done again, and finds out
    whose doing it is.
    """
    if isinstance(error, MintError):
        return False
    return isinstance(error, _KINDS) or bool(_WORDS.search(str(error)))
