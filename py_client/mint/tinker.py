"""The names of `mint`, the same objects, for scripts that say `from mint import tinker`."""

from mint import *  # noqa: F403 - whatever is public there
from mint import __all__ as __all__
