"""The names of `mint.renderers`, for scripts that look for them here."""

from mint.renderers import *  # noqa: F403 - whatever is public there
from mint.renderers import __all__ as __all__
