"""From conversations to training data: renderers, weights, datums. No torch."""

from mint.recipe import renderers
from mint.recipe.datums import Reduction, conversation_to_datum, datum_from_model_input_weights
from mint.recipe.model_info import get_recommended_renderer_name, get_tokenizer
from mint.recipe.renderers import Message, TrainOnWhat

__all__ = [
    "Message",
    "Reduction",
    "TrainOnWhat",
    "conversation_to_datum",
    "datum_from_model_input_weights",
    "get_recommended_renderer_name",
    "get_tokenizer",
    "renderers",
]
