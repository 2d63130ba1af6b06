"""The Mamba 2 layers of Granite 4 hybrids: a short convolution, a state that fades and takes in
what a row writes, and a gated norm, between projections that LoRA trains.

T: rows of the stream. h: heads. k: size of the state's keys. v: of a head's values.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mint_core.model.mixers.convolution import convolved, convolved_step
from mint_core.model.mixers.delta_rule import delta_step, recalled
from mint_core.model.mixers.mixer import Inputs, MixerContext, States, StateShape
from mint_core.model.mixers.runs import CHUNK_ROWS, Runs
from mint_core.model.mixers.vectors import WHOLE_VECTORS, by_rows
from mint_core.model.shortcuts import RmsNorm

_PARTS = ("conv1d", "A_log", "D", "dt_bias", "norm", "in_proj", "out_proj", "ssm_state_size")


class Mamba:
    """Such a layer's forward."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in (*_PARTS, "time_step_limit", "n_groups"))

    def __init__(self, module: Any, context: MixerContext) -> None:
        self._module = module
        self._context = context
        self.layer_index: int = module.layer_idx
        self._heads, self._groups = module.num_heads, module.n_groups
        self._key_size, self._value_size = module.ssm_state_size, module.head_dim
        keys, values = self._groups * self._key_size, self._heads * self._value_size
        self._widths = [values, keys, keys]
        width = sum(self._widths)
        self.input_widths: tuple[int, ...] = values, width, self._heads
        # All in float32: a state takes in many rows.
        self._taps = module.conv1d.weight.detach()[:, 0].t().float().contiguous()  # [taps, width]
        self._bias = 0.0 if module.conv1d.bias is None else module.conv1d.bias.detach().float()
        self.state_shapes: tuple[StateShape, ...] = (
            StateShape((len(self._taps) - 1, width), torch.float32),
            StateShape((self._heads, self._key_size, self._value_size), torch.float32),
        )
        chunk = CHUNK_ROWS[-1]
        by_head = 3 * chunk + self._key_size * (self._value_size // chunk + 4)
        self.working_bytes = 4 * (6 * width + 10 * values + self._heads * by_head)
        norm = module.norm
        group = getattr(norm, "group_size", values)  # channels that are normed together
        weight = norm.weight.detach().float().view(-1, group)
        self._norm = RmsNorm(weight, norm.variance_epsilon)
        self._fill = 0, -self._heads % WHOLE_VECTORS
        self._fading = functional.pad(-module.A_log.detach().float().exp(), self._fill)
        self._step_bias = functional.pad(module.dt_bias.detach().float(), self._fill)
        self._limits: tuple[float, float] = module.time_step_limit
        self._passed = module.D.detach().float()[:, None]  # [h, 1], of a row's own values

    def __call__(self, hidden_states: Tensor, **_: Any) -> Tensor:  # [1, T, d]
        projected = self._module.in_proj(hidden_states)[0]
        mixed = self._context.mix(self, projected.split(list(self.input_widths), dim=-1))
        output: Tensor = self._module.out_proj(mixed)[None]
        return output

    def whole(self, inputs: Inputs, runs: Runs, states: States | None) -> tuple[Tensor, States]:
        """See Mixer."""
        gates, mixed, steps = inputs
        before, state = states or (None, None)
        mixed, last = convolved(mixed.float(), self._taps, runs, before)
        values, *others = self._heads_of(mixed)
        keys, queries = (runs.chunks.take(x) for x in others)
        fading, rates = self._scalars(steps)
        taken = runs.chunks.take(torch.cat([fading, rates], dim=1))
        fades, write = (part[:, : self._heads] for part in taken.chunk(2, dim=1))
        heads = queries, keys, runs.chunks.take(values)
        output, after = recalled(heads, fades, write, runs, state, corrects=False)
        output = self._gated(output.view_as(values), values, gates)
        return output, () if last is None or after is None else (last, after)

    def step(self, inputs: Inputs, states: States) -> tuple[Tensor, States]:
        """See Mixer."""
        gates, mixed, steps = inputs
        before, state = states
        mixed, last = convolved_step(mixed.float(), self._taps, before)
        values, keys, queries = self._heads_of(mixed)
        fading, rates = self._scalars(steps)
        kept, rates = fading.exp()[:, : self._heads], rates[:, : self._heads]
        output = delta_step(queries, keys, values, kept, rates, state, corrects=False)
        return self._gated(output, values, gates), (last, state)

    def _heads_of(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, width], convolved -> values [T, h, v], keys and queries [T, h, k]."""
        parts = by_rows(functional.silu, mixed + self._bias).split(self._widths, dim=1)
        each = self._heads // self._groups
        keys, queries = (
            part.unflatten(1, (self._groups, -1)).repeat_interleave(each, dim=1)
            for part in parts[1:]
        )
        return parts[0].unflatten(1, (self._heads, -1)), keys, queries

    def _scalars(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """[T, h] -> logarithms of what is kept, and rates of what is written, float32, with columns
        that only fill up.
        """
        rates = functional.softplus(functional.pad(steps.float(), self._fill) + self._step_bias)
        rates = rates.clamp(*self._limits)
        return rates * self._fading, rates

    def _gated(self, output: Tensor, values: Tensor, gates: Tensor) -> Tensor:
        """[T, h, v], [T, h, v], [T, h v] -> [T, h v]."""
        passed = (output + values * self._passed).flatten(1)
        passed = passed * by_rows(functional.silu, gates.float())
        return self._norm(passed.view(-1, *self._norm.weight.shape)).flatten(1).to(gates.dtype)
