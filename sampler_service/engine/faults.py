"""Whose fault an exception is: a call's, which then ends alone, or the engine's."""

import logging
import re

from mint_core.errors import EngineFault, MintError

logger = logging.getLogger(__name__)

# How torch, its libraries and drivers speak of the device or of memory. What they compute after
# that is not to be trusted, and no call is to blame.
_OF_THE_ENGINE = re.compile("cuda|cublas|cudnn|triton|out of memory|alloc", re.IGNORECASE)


def error_of_call(error: Exception) -> MintError:
    """What the call is told in whose work it was raised. Raises it again if memory or the device
    has failed: then the engine is to end.
    """
    if isinstance(error, MintError):
        return error
    if isinstance(error, MemoryError) or _OF_THE_ENGINE.search(str(error)):
        raise error
    logger.error("call failed in the engine", exc_info=error)
    return EngineFault(
        f"the engine failed at this call with {type(error).__name__}; the server's log has the "
        "details"
    )
