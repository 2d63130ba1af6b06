"""The gated short convolution of LFM2, between projections that LoRA trains.

T: rows of the stream. d: hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mint_core.model.mixers.convolution import convolved, convolved_step
from mint_core.model.mixers.mixer import Inputs, MixerContext, States, StateShape
from mint_core.model.mixers.runs import Runs


class ShortConvolution:
    """Such a layer's forward."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        parts = ("conv", "in_proj", "out_proj", "conv_kernel_size", "layer_idx")
        return all(hasattr(module, name) for name in parts)

    def __init__(self, module: Any, context: MixerContext) -> None:
        self._module = module
        self._context = context
        self.layer_index: int = module.layer_idx
        self._taps = module.conv.weight.detach()[:, 0].t().float().contiguous()  # [taps, d]
        self._bias = None if module.conv.bias is None else module.conv.bias.detach().float()
        width = self._taps.shape[1]
        self.input_widths: tuple[int, ...] = (3 * width,)
        self.state_shapes: tuple[StateShape, ...] = (
            StateShape((len(self._taps) - 1, width), torch.float32),
        )
        self.working_bytes = 4 * 8 * width

    def __call__(self, hidden_states: Tensor, **_: Any) -> Tensor:  # [1, T, d]
        mixed = self._context.mix(self, (self._module.in_proj(hidden_states)[0],))
        output: Tensor = self._module.out_proj(mixed)[None]
        return output

    def whole(self, inputs: Inputs, runs: Runs, states: States | None) -> tuple[Tensor, States]:
        """See Mixer."""
        into, out, x = inputs[0].chunk(3, dim=1)
        before = None if states is None else states[0]
        y, last = convolved((into * x).float(), self._taps, runs, before)
        return self._gated(y, out), () if last is None else (last,)

    def step(self, inputs: Inputs, states: States) -> tuple[Tensor, States]:
        """See Mixer."""
        into, out, x = inputs[0].chunk(3, dim=1)
        y, last = convolved_step((into * x).float(), self._taps, states[0])
        return self._gated(y, out), (last,)

    def _gated(self, y: Tensor, out: Tensor) -> Tensor:
        y = y if self._bias is None else y + self._bias
        return out * y.to(out.dtype)
