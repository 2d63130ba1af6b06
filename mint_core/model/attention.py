"""Causal attention over a packed stream of documents, through transformers' attention registry.

A forward pass of the model is given `attention_batch=`, an `AttentionBatch`; the registry hands it
on to every layer.
"""

import itertools
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from mint_core.errors import FailedPrecondition

REGISTERED_NAME = "mint_packed"


class AttentionBatch(Protocol):
    """Computes attention for the pass at hand."""

    def attend(
        self,
        layer_index: int,
        query: Tensor,  # [heads, tokens, head size]
        key: Tensor,  # [key heads, tokens, head size]
        value: Tensor,  # [key heads, tokens, head size]
        scaling: float,
        sliding_window: int | None,  # tokens, the query's own included; None: no limit
    ) -> Tensor:  # [heads, tokens, head size]
        ...


class PackedAttention:
    """Each document attends to itself alone."""

    def __init__(self, bounds: list[int]) -> None:
        self._spans = list(itertools.pairwise(bounds))  # of each document, in the stream

    def attend(
        self,
        layer_index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        outputs = [
            causal_attention(
                query[:, start:stop],
                key[:, start:stop],
                value[:, start:stop],
                scaling,
                sliding_window,
            )
            for start, stop in self._spans
        ]
        return torch.cat(outputs, dim=1)


def causal_attention(
    query: Tensor,  # [heads, queries, head size]: the last rows of the sequence
    key: Tensor,  # [key heads, keys, head size]
    value: Tensor,  # [key heads, keys, head size]
    scaling: float,
    sliding_window: int | None,
) -> Tensor:  # [heads, queries, head size]
    """Attention of one sequence whose last `queries` positions ask."""
    queries, keys = query.shape[1], key.shape[1]
    windowed = sliding_window is not None and keys > sliding_window
    mask = None
    if windowed or 1 < queries < keys:
        mask = _mask(queries, keys, sliding_window if windowed else None, query.device)
    return functional.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=mask is None and queries > 1,
        scale=scaling,
        enable_gqa=query.shape[0] != key.shape[0],
    )[0]


def _mask(
    queries: int, keys: int, window: int | None, device: torch.device
) -> Tensor:  # [queries, keys]
    at = torch.arange(keys - queries, keys, device=device)[:, None]
    seen = torch.arange(keys, device=device)[None]
    mask = seen <= at
    return mask if window is None else mask & (seen > at - window)


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
    if softcap is not None or s_aux is not None:
        raise FailedPrecondition(
            f"the base model's attention ({type(module).__name__}) uses soft-capped logits or "
            "sinks, which are not "
            "supported; serve a model without them"
        )
    assert attention_batch is not None, "the model must be called with attention_batch="
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    layer_index: int = module.layer_idx  # type: ignore[assignment]
    output = attention_batch.attend(
        layer_index, query[0], key[0], value[0], scaling, sliding_window
    )
    return output.transpose(0, 1)[None], None  # [1, tokens, heads, head size]


def register() -> None:
    """Makes `attn_implementation=REGISTERED_NAME` known to transformers, which builds no mask."""
    AttentionInterface.register(REGISTERED_NAME, _attend)
