"""What of an answer can be compared."""

from collections.abc import Mapping

TIMES = {"tokens_per_second:mean"}  # metrics that tell how long something took


def exact(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """The metrics that a call has each time it is made."""
    return {name: value for name, value in (metrics or {}).items() if name not in TIMES}
