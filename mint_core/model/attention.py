"""Causal attention over a packed stream of documents, through transformers' attention registry.

A forward pass of the model is given `attention_batch=`, an `AttentionBatch`; the registry hands it
on to every layer.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from mint_core.model.attention_kernels import (
    Scores,
    causal_attention,
    long_causal_attention,
    varlen_attention,
    varlen_fits,
)
from mint_core.model.mixers.mixer import Inputs, Mixer, MixerBatch, Recomputed
from mint_core.model.mixers.runs import Runs
from mint_core.model.stacked_attention import Stacks

REGISTERED_NAME = "mint_packed"
# From here on a document is worth a call of its own on an accelerator: the kernel for one sequence
# is the faster one. H200, forward and backward, against that for many, in TFLOP/s: 2,048 tokens 114
# and 191, 8,192 tokens 422 and 268 (benchmarks/gpu_checklist.py, 2026-11-26).
LONG_DOCUMENT_TOKENS = 4096
_WITHOUT_EFFECT = ("position_ids", "cache_position")  # on scores: rotary embeddings have had theirs

Attend = Callable[[Tensor, Tensor, Tensor, Scores], Tensor]  # query, key, value -> output


class AttentionBatch(MixerBatch, Protocol):
    """Computes attention for the pass at hand, and what mixes tokens otherwise."""

    def attend(
        self,
        layer_index: int,
        query: Tensor,  # [heads, tokens, head size]
        key: Tensor,  # [key heads, tokens, head size]
        value: Tensor,  # [key heads, tokens, head size]
        scores: Scores,
    ) -> Tensor:  # [heads, tokens, head size]
        ...


class PackedAttention:
    """Each document attends to itself alone."""

    def __init__(self, bounds: list[int]) -> None:
        self._bounds = bounds  # of the documents in the stream
        self._on_device: dict[tuple[int, ...], Tensor] = {}  # bounds of groups, from their start
        # By window, runs of neighbours: how many tokens they have, and how they attend.
        self._runs: dict[int | None, list[tuple[int, Attend]]] = {}
        self._documents: Runs | None = None

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        if varlen_fits(query, key, value, scores):
            outputs = [self._attend(query, key, value, group, scores) for group in self._groups]
            return torch.cat(outputs, dim=1)
        stacks = (
            query.device.type == "cpu" and scores.softcap is None and key.shape[2] == value.shape[2]
        )
        runs = self._runs_within(scores.sliding_window if stacks else 0)
        if len(runs) == 1:
            return runs[0][1](query, key, value, scores)
        # One split each, since the gradient of a slice is a tensor as large as the stream.
        sizes = [tokens for tokens, _ in runs]
        queries, keys, values = (whole.split(sizes, dim=1) for whole in (query, key, value))
        outputs = [
            attend(q, k, v, scores)
            for (_, attend), q, k, v in zip(runs, queries, keys, values, strict=True)
        ]
        return torch.cat(outputs, dim=1)

    def mix(self, layer_index: int, mixer: Mixer, inputs: Inputs) -> Tensor:
        if self._documents is None:
            spans = list(itertools.pairwise(self._bounds))
            self._documents = Runs(spans, self._bounds[-1], inputs[0].device)
        if torch.is_grad_enabled():
            output: Tensor = Recomputed.apply(mixer, self._documents, *inputs)  # type: ignore[no-untyped-call]
            return output
        return mixer.whole(inputs, self._documents, None)[0]

    def _runs_within(self, window: int | None) -> list[tuple[int, Attend]]:
        """Neighbours that a window leaves whole together, others alone: all in one of 0."""

        def fits(tokens: int) -> bool:
            return window is None or tokens <= window

        if window not in self._runs:
            runs = self._runs[window] = []
            for group in group_documents(self._bounds, fits):
                bounds = [bound - group[0] for bound in group]
                attend = Stacks(bounds).attend if fits(bounds[1]) else causal_attention
                runs.append((bounds[-1], attend))
        return self._runs[window]

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, group: tuple[int, ...], scores: Scores
    ) -> Tensor:
        rows = slice(group[0], group[-1])
        query, key, value = query[:, rows], key[:, rows], value[:, rows]
        longest = max(stop - start for start, stop in itertools.pairwise(group))
        windowed = scores.sliding_window is not None and scores.sliding_window < longest
        if longest >= LONG_DOCUMENT_TOKENS and not windowed:
            return long_causal_attention(query, key, value, scores)
        if group not in self._on_device:
            bounds = [bound - group[0] for bound in group]
            self._on_device[group] = torch.tensor(bounds, dtype=torch.int32, device=query.device)
        return varlen_attention(query, key, value, self._on_device[group], longest, scores)

    @cached_property
    def _groups(self) -> list[tuple[int, ...]]:
        return group_documents(self._bounds, lambda tokens: tokens < LONG_DOCUMENT_TOKENS)


def group_documents(bounds: Sequence[int], fits: Callable[[int], bool]) -> list[tuple[int, ...]]:
    """The bounds of documents to compute in one call: runs of those whose lengths fit, and each
    other one alone.
    """
    groups: list[tuple[int, ...]] = []
    documents = itertools.pairwise(bounds)
    for fit, same in itertools.groupby(documents, lambda d: fits(d[1] - d[0])):
        run = list(same)
        groups += [(run[0][0], *(stop for _, stop in run))] if fit else run
    return groups


def _attend(
    module: nn.Module,
    query: Tensor,  # [1, heads, tokens, head size]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    attention_batch: AttentionBatch | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,  # what the model's layers hand to every attention function
) -> tuple[Tensor, None]:  # [1, tokens, heads, head size]
    tensors = (name for name, value in others.items() if isinstance(value, Tensor))
    unknown = next((name for name in tensors if name not in _WITHOUT_EFFECT), None)
    what = None
    if s_aux is not None:
        what = "uses attention sinks"
    elif attention_mask is not None:
        what = "makes a mask of its own"
    elif unknown is not None:
        what = f"is handed `{unknown}`, of which nothing is known here"
    elif attention_batch is None:
        what = "is not told where documents begin"
    if what or attention_batch is None:
        raise NotImplementedError(f"its attention ({type(module).__name__}) {what}")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    layer_index: int = module.layer_idx  # type: ignore[assignment]
    own_size = value.shape[-1]
    if own_size < key.shape[-1]:  # of latent attention; kernels that keep no scores want one size
        value = functional.pad(value, (0, key.shape[-1] - own_size))
    output = attention_batch.attend(
        layer_index, query[0], key[0], value[0], Scores(scaling, sliding_window, softcap)
    )
    # As transformers' own functions give it: some models take a view of it.
    return output[..., :own_size].transpose(0, 1)[None].contiguous(), None


def register() -> None:
    """Makes `attn_implementation=REGISTERED_NAME` known to transformers, which builds no mask."""
    AttentionInterface.register(REGISTERED_NAME, _attend)
