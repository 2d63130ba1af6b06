"""Recomputation of decoder layers in backward, for a pass whose activations do not fit."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass(slots=True)
class Recomputation:
    """A switch for all decoder layers. While it is on, a pass under autograd keeps the input of
    each layer alone.
    """

    layers: int  # 0: the model has none that can be recomputed
    on: bool = False

    def run(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.on and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return layer(*args, **kwargs)


def install_recomputation(model: nn.Module) -> Recomputation:
    """Wraps the model's decoder layers."""
    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    recomputation = Recomputation(len(layers))
    for layer in layers:
        layer.forward = partial(recomputation.run, layer.forward)
    return recomputation
