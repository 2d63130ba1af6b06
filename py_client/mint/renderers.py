"""The names of `mint.recipe.renderers`, for scripts that look for them here."""

from mint.recipe.renderers import *  # noqa: F403 - whatever is public there
from mint.recipe.renderers import __all__ as __all__
