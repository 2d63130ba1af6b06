"""A mixer with state: what some layers have where others have attention.

Tokens of a sequence meet in a state of fixed size, which each of them changes. Between its
projections, which see single tokens, a layer is a `Mixer`; the pass at hand says where sequences
lie and with which states they begin.

T: rows of the stream. n: sequences.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mint_core.model.mixers.runs import Runs

Inputs = tuple[Tensor, ...]  # what a layer's projections give, each [T, width]
States = tuple[Tensor, ...]  # the parts of the states of sequences, each [n, *sizes]


@dataclass(frozen=True, slots=True)
class StateShape:
    """Of one part of a layer's state, for one sequence."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


class Mixer(Protocol):
    """Of one layer. What a sequence gets depends on its own rows and state alone."""

    layer_index: int
    input_widths: tuple[int, ...]
    state_shapes: tuple[StateShape, ...]
    working_bytes: int  # that backward takes for each token while it is at this layer

    def whole(self, inputs: Inputs, runs: Runs, states: States | None) -> tuple[Tensor, States]:
        """Output [T, width], and the states after the runs' last rows. `states`: with which the
        runs begin; None: as zeros do, and then none are returned.
        """
        ...

    def step(self, inputs: Inputs, states: States) -> tuple[Tensor, States]:
        """One row of each sequence: output [n, width], and the states after it."""
        ...


class MixerBatch(Protocol):
    """The sequences of the pass at hand."""

    def mix(self, layer_index: int, mixer: Mixer, inputs: Inputs) -> Tensor:  # [T, width]
        ...


class MixerContext:
    """What the mixers of one model are told. One object, shared by all of them: not every version
    of every layer hands on what it is called with.
    """

    def __init__(self) -> None:
        # Stays until the next pass's: what is recomputed in backward reads it again.
        self.batch: MixerBatch | None = None

    def mix(self, mixer: Mixer, inputs: Inputs) -> Tensor:
        assert self.batch is not None, "a pass is begun by LoadedBase.hidden"
        return self.batch.mix(mixer.layer_index, mixer, inputs)


class Recomputed(torch.autograd.Function):
    """A mixer's output of whole documents, of which its inputs alone are kept for backward."""

    @staticmethod
    def forward(ctx: Any, mixer: Mixer, runs: Runs, *inputs: Tensor) -> Tensor:
        ctx.mixer, ctx.runs = mixer, runs
        ctx.save_for_backward(*inputs)
        return mixer.whole(inputs, runs, None)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = tuple(x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            output, _ = ctx.mixer.whole(inputs, ctx.runs, None)
        return None, None, *torch.autograd.grad(output, inputs, gradients[0])


def no_states(mixer: Mixer, count: int, device: torch.device) -> States:
    """Of sequences that begin."""
    return tuple(
        torch.zeros(count, *shape.sizes, dtype=shape.dtype, device=device)
        for shape in mixer.state_shapes
    )
