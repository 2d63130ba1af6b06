"""The linear attention of Qwen3.5 and Qwen3-Next: a short convolution, the gated delta rule over
heads, and a gated norm, between projections that LoRA trains.

T: rows of the stream. n: sequences. D: runs. h: heads of values; those of keys may be fewer, each
for several neighbours. k, v: sizes of a head's keys and values.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mint_core.model.mixers.convolution import convolved, convolved_step
from mint_core.model.mixers.delta_rule import delta_step, recalled
from mint_core.model.mixers.delta_rule_fla import fla_computes, recalled_by_fla
from mint_core.model.mixers.mixer import Inputs, MixerContext, States, StateShape
from mint_core.model.mixers.runs import CHUNK_ROWS, Runs
from mint_core.model.mixers.vectors import WHOLE_VECTORS, by_rows
from mint_core.model.shortcuts import RmsNorm

NORM_EPS = 1e-6  # of keys and queries
_PARTS = ("conv1d", "A_log", "dt_bias", "norm", "out_proj", "num_k_heads", "num_v_heads")


class GatedDeltaNet:
    """Such a layer's forward."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in _PARTS) and (
            hasattr(module, "in_proj_qkv") or hasattr(module, "in_proj_qkvz")
        )

    def __init__(self, module: Any, context: MixerContext) -> None:
        self._module = module
        self._context = context
        self.layer_index: int = module.layer_idx
        self._key_heads, self._heads = module.num_k_heads, module.num_v_heads
        self._key_size, self._value_size = module.head_k_dim, module.head_v_dim
        keys, values = self._key_heads * self._key_size, self._heads * self._value_size
        self._widths = [keys, keys, values]
        width = sum(self._widths)
        self.input_widths: tuple[int, ...] = width, values, self._heads, self._heads
        # All in float32: a state takes in many rows.
        self._taps = module.conv1d.weight.detach()[:, 0].t().float().contiguous()  # [taps, width]
        sizes = self._heads, self._key_size, self._value_size
        self.state_shapes: tuple[StateShape, ...] = (
            StateShape((len(self._taps) - 1, width), torch.float32),
            StateShape(sizes, torch.float32),
        )
        self._dtype = module.conv1d.weight.dtype
        self._by_fla = fla_computes(module.conv1d.weight)
        chunk = CHUNK_ROWS[-1]
        by_head = 3 * chunk + self._key_size * self._value_size // chunk
        self.working_bytes = 4 * (10 * width + 8 * values + self._heads * by_head)
        # One head's length is 1: keys as they are, queries over the root of their size.
        scales = [self._key_size**-1.0, self._key_size**-0.5]
        self._norms = [
            RmsNorm(torch.tensor(s, device=self._taps.device), NORM_EPS / self._key_size)
            for s in scales
        ]
        norm = module.norm
        self._out_norm = RmsNorm(norm.weight.detach().float(), norm.variance_epsilon)
        self._fill = 0, -self._heads % WHOLE_VECTORS
        rates = -module.A_log.detach().float().exp()
        self._fading = functional.pad(rates, self._fill)
        self._bias = functional.pad(module.dt_bias.detach().float(), self._fill)

    def __call__(self, hidden_states: Tensor, **_: Any) -> Tensor:  # [1, T, d]
        mixed = self._context.mix(self, self._projected(hidden_states))
        output: Tensor = self._module.out_proj(mixed)[None]
        return output

    def _projected(self, x: Tensor) -> Inputs:
        """Queries, keys and values side by side; the gates of the output; of what is written, and
        of what fades.
        """
        module = self._module
        if hasattr(module, "in_proj_qkv"):
            names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
            return tuple(getattr(module, name)(x)[0] for name in names)
        # What belongs to a head of keys lies together.
        values = self._heads // self._key_heads * self._value_size
        sizes = [self._key_size, self._key_size, values, values]
        by_head = module.in_proj_qkvz(x)[0].unflatten(-1, (self._key_heads, -1))
        *mixed, gates = (part.flatten(1) for part in by_head.split(sizes, dim=-1))
        others = module.in_proj_ba(x)[0].unflatten(-1, (self._key_heads, -1))
        rates, fading = (part.flatten(1) for part in others.chunk(2, dim=-1))
        return torch.cat(mixed, dim=1), gates, rates, fading

    def whole(self, inputs: Inputs, runs: Runs, states: States | None) -> tuple[Tensor, States]:
        """See Mixer."""
        mixed, gates, rates, fading = inputs
        before, state = states or (None, None)
        mixed, last = convolved(mixed.float(), self._taps, runs, before)
        layout = runs.one_by_one if self._by_fla else runs.chunks
        heads = self._heads_of(layout.take(by_rows(functional.silu, mixed)))
        scalars = layout.take(torch.cat(self._scalars(rates, fading), dim=1))
        fades, write = (part[:, : self._heads] for part in scalars.chunk(2, dim=1))
        if self._by_fla:
            output, after = recalled_by_fla(heads, fades, write, runs, state, self._dtype)
        else:
            output, after = recalled(heads, fades, write, runs, state)
        output = self._gated(output, gates)
        return output, () if last is None or after is None else (last, after)

    def step(self, inputs: Inputs, states: States) -> tuple[Tensor, States]:
        """See Mixer."""
        mixed, gates, rates, fading = inputs
        before, state = states
        mixed, last = convolved_step(mixed.float(), self._taps, before)
        queries, keys, values = self._heads_of(by_rows(functional.silu, mixed))
        fades, rates = self._scalars(rates, fading)
        kept = fades.exp()[:, : self._heads]
        output = delta_step(queries, keys, values, kept, rates[:, : self._heads], state)
        return self._gated(output.flatten(1), gates), (last, state)

    def _heads_of(self, mixed: Tensor) -> list[Tensor]:  # [T, width] -> [T, h, k], ..., [T, h, v]
        """Queries, keys and values, for every head of values."""
        parts = mixed.split(self._widths, dim=1)
        found = [
            norm(part.unflatten(1, (-1, self._key_size)))
            for norm, part in zip(self._norms, parts[:2], strict=True)
        ]
        if self._heads > self._key_heads:
            found = [x.repeat_interleave(self._heads // self._key_heads, dim=1) for x in found]
        return [*found, parts[2].unflatten(1, (-1, self._value_size))]

    def _scalars(self, rates: Tensor, fading: Tensor) -> tuple[Tensor, Tensor]:
        """[T, h] of each -> logarithms of what is kept, and rates of what is written, float32, with
        columns that only fill up.
        """
        rates, fading = (functional.pad(x.float(), self._fill) for x in (rates, fading))
        return functional.softplus(fading + self._bias) * self._fading, rates.sigmoid()

    def _gated(self, output: Tensor, gates: Tensor) -> Tensor:  # [T, h v] each
        normed = self._out_norm(output.unflatten(1, (-1, self._value_size))).flatten(1)
        return (normed * by_rows(functional.silu, gates.float())).to(gates.dtype)
