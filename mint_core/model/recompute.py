"""Recomputation of decoder layers in backward, for a pass whose activations do not fit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


class Recomputation:
    """A switch for all decoder layers. While it is on, a pass under autograd keeps the input of
    each layer alone.
    """

    def __init__(self) -> None:
        self.layers = 0  # that can be recomputed
        self.on = False

    def install(self, model: nn.Module) -> None:
        """Wraps the model's decoder layers."""
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.forward = partial(self._run, module.forward)
                self.layers += 1

    def _run(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.on and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return layer(*args, **kwargs)
