"""The names of `mint.recipe.renderers`, and what scripts look for beside them, in one place."""

from mint.recipe import datum_from_model_input_weights as datum_from_model_input_weights
from mint.recipe import get_recommended_renderer_name as get_recommended_renderer_name
from mint.recipe.renderers import *  # noqa: F403 - whatever is public there
from mint.recipe.renderers import __all__ as _names

__all__ = [*_names, "datum_from_model_input_weights", "get_recommended_renderer_name"]
