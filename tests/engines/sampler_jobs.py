"""What tests ask of `tests.engines.sampler`, beside the sampler's own jobs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Use:
    """Raises AdapterAbsent if the adapter is not there. Answer: all that are, in order."""

    revision_path: str


@dataclass(frozen=True, slots=True)
class Die:
    """No answer."""
