"""Causal attention over a packed stream of documents, through transformers' attention registry.

A forward pass of the model is given `attention_batch=`, an `AttentionBatch`; the registry hands it
on to every layer.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from mint_core.errors import FailedPrecondition
from mint_core.model.attention_kernels import (
    Scores,
    causal_attention,
    long_causal_attention,
    stacked_causal_attention,
    varlen_attention,
    varlen_fits,
)

REGISTERED_NAME = "mint_packed"
# From here on a document is worth a call of its own on an accelerator: the launches no longer
# count, and the kernel for one sequence is the faster one.
LONG_DOCUMENT_TOKENS = 1024


class AttentionBatch(Protocol):
    """Computes attention for the pass at hand."""

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

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        if not varlen_fits(query, key, value, scores):
            return self._attend_stacks(query, key, value, scores)
        outputs = [self._attend(query, key, value, group, scores) for group in self._groups]
        return torch.cat(outputs, dim=1)

    def _attend_stacks(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Neighbours of one length are computed in one call, where that changes no bit."""
        stacks = list(_stacks(self._bounds, scores))
        if len(stacks) == 1:
            return _attend_stack(query, key, value, stacks[0][1], scores)
        # One split each, since the gradient of a slice is a tensor as large as the stream.
        sizes = [length * count for length, count in stacks]
        queries, keys, values = (whole.split(sizes, dim=1) for whole in (query, key, value))
        outputs = [
            _attend_stack(q, k, v, count, scores)
            for (_, count), q, k, v in zip(stacks, queries, keys, values, strict=True)
        ]
        return torch.cat(outputs, dim=1)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, group: tuple[int, ...], scores: Scores
    ) -> Tensor:
        parts = _cut(query, key, value, group)
        longest = max(stop - start for start, stop in itertools.pairwise(group))
        windowed = scores.sliding_window is not None and scores.sliding_window < longest
        if longest >= LONG_DOCUMENT_TOKENS and not windowed:
            return long_causal_attention(*parts, scores)
        if group not in self._on_device:
            bounds = [bound - group[0] for bound in group]
            self._on_device[group] = torch.tensor(bounds, dtype=torch.int32, device=query.device)
        return varlen_attention(*parts, self._on_device[group], longest, scores)

    @cached_property
    def _groups(self) -> list[tuple[int, ...]]:
        return group_documents(self._bounds, LONG_DOCUMENT_TOKENS)


def _attend_stack(q: Tensor, k: Tensor, v: Tensor, count: int, scores: Scores) -> Tensor:
    if count == 1:
        return causal_attention(q, k, v, scores)
    return stacked_causal_attention(q, k, v, scores, count)


def _stacks(bounds: Sequence[int], scores: Scores) -> Iterator[tuple[int, int]]:
    """(tokens of each, how many) of neighbouring documents to compute in one call."""
    lengths = (stop - start for start, stop in itertools.pairwise(bounds))
    for length, same in itertools.groupby(lengths):
        count = len(list(same))
        if scores.softcap is None and not (
            scores.sliding_window and scores.sliding_window < length
        ):
            yield length, count
        else:
            yield from [(length, 1)] * count


def _cut(
    query: Tensor, key: Tensor, value: Tensor, group: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    rows = slice(group[0], group[-1])
    return query[:, rows], key[:, rows], value[:, rows]


def group_documents(bounds: Sequence[int], long_tokens: int) -> list[tuple[int, ...]]:
    """The bounds of documents to compute in one call: each long one alone, and runs of shorter
    ones.
    """
    groups: list[list[int]] = []
    grow = False
    for start, stop in itertools.pairwise(bounds):
        short = stop - start < long_tokens
        if short and grow:
            groups[-1].append(stop)
        else:
            groups.append([start, stop])
        grow = short
    return [tuple(group) for group in groups]


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
    **_: Any,  # what the model's layers hand to every attention function, such as position ids
) -> tuple[Tensor, None]:
    if s_aux is not None:
        raise FailedPrecondition(
            f"the base model's attention ({type(module).__name__}) uses attention sinks, which are "
            "not supported; serve a model without them"
        )
    if attention_batch is None:
        raise FailedPrecondition(
            f"the base model's attention ({type(module).__name__}) is not told where documents "
            "begin, so they cannot be packed; serve another model"
        )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    layer_index: int = module.layer_idx  # type: ignore[assignment]
    output = attention_batch.attend(
        layer_index, query[0], key[0], value[0], Scores(scaling, sliding_window, softcap)
    )
    return output.transpose(0, 1)[None], None  # [1, tokens, heads, head size]


def register() -> None:
    """Makes `attn_implementation=REGISTERED_NAME` known to transformers, which builds no mask."""
    AttentionInterface.register(REGISTERED_NAME, _attend)
