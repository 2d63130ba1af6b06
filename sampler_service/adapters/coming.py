"""What it costs until an adapter is in an engine."""

from enum import IntEnum


class Coming(IntEnum):
    """In tokens that the engine computes meanwhile, about."""

    THERE = 0  # or on its way
    INTO_FREE_PLACE = 64
    FOR_ANOTHER = 256  # which has to go, and to come again
    AFTER_OTHERS = 4096  # all places are in use
