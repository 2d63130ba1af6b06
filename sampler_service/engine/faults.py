"""Whose fault an exception is: a call's, which then ends alone, or the engine's."""

import logging

from mint_core.errors import EngineFault, MintError
from mint_core.model.faults import ends_the_engine

logger = logging.getLogger(__name__)


def error_of_call(error: Exception) -> MintError:
    """What the call is told in whose work it was raised. Raises it again if memory or the device
    has failed: then the engine is to end.
    """
    if isinstance(error, MintError):
        return error
    if ends_the_engine(error):
        raise error
    logger.error("call failed in the engine", exc_info=error)
    return EngineFault(
        f"the engine failed at this call with {type(error).__name__}; the server's log has the "
        "details"
    )
