"""A base model as loading.py makes it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mint_core.engine_host.pipe import ModelDescription
from mint_core.lora.bank import AdapterBank
from mint_core.lora.groups import LinearShape, ModuleGroup
from mint_core.lora.layers import LoraContext
from mint_core.lora.products import onednn
from mint_core.lora.segment_tables import Tables
from mint_core.lora.segments import MIN_ROWS, Segment
from mint_core.model.attention import AttentionBatch
from mint_core.model.head import Head
from mint_core.model.mixers.mixer import Mixer, MixerContext
from mint_core.model.routing import Routing


class Recomputation:
    """A switch for all decoder layers, for a pass whose activations do not fit. While it is on, a
    pass under autograd keeps the input of each layer alone.
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


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A frozen base model ready to run packed streams with many adapters."""

    model: nn.Module
    text: nn.Module  # the part of it that makes hidden states of tokens
    logit_factor: float  # of the product of hidden states and head
    head: Head
    context: LoraContext
    recomputation: Recomputation
    shapes: dict[str, LinearShape]
    groups: tuple[ModuleGroup, ...]  # of all linear layers, those that read one tensor together
    description: ModelDescription
    device: torch.device
    dtype: torch.dtype
    # Rows that a segment must have for bits that do not depend on others: 1 where those that are
    # rowwise may have fewer than MIN_ROWS.
    min_rows: int = MIN_ROWS
    routing: Routing | None = None  # of a model that has experts
    mixers: dict[int, Mixer] = field(default_factory=dict)  # by layer, of those with state
    mixing: MixerContext = field(default_factory=MixerContext)
    by_onednn: bool = False  # whether any product is, of which kernels are made by rows

    def rows_computed(self, tokens: int) -> int:
        """How many rows a pass over so many tokens has, so that no product need be filled up."""
        return onednn.rows_computed(tokens) if self.by_onednn else tokens

    def new_bank(self) -> AdapterBank:
        return AdapterBank(self.groups, self.device)

    def hidden(
        self,
        tokens: Tensor,  # [tokens]
        positions: Tensor,  # [tokens], from 0 in each document
        segments: tuple[Segment, ...],  # covering the stream
        attention: AttentionBatch,
        routed: Tensor | None = None,  # [tokens, L, k] experts, -1 where the routers choose
        recorded: Tables | None = None,  # of a pass that is recorded
    ) -> Tensor:  # [tokens, hidden size]
        """The last hidden state of a packed stream, as the head takes it. In grad mode its backward
        trains the rows of segments that accumulate; it needs none if they adapt no layer below the
        head.
        """
        if self.routing is not None:
            self.routing.begin(routed)
        self.mixing.batch = attention
        with self.context.applying(segments, recorded):
            output = self.text(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                attention_batch=attention,
            )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden if self.logit_factor == 1.0 else hidden * self.logit_factor
