"""Causal attention of one sequence, or of several short ones at once on an accelerator."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

BLOCK_BYTES = 64 * 1024**2  # of the scores of one block of queries, in float32
MOST_BLOCK_QUERIES = 512
_PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_VARLEN_GROUPS_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch >= 2.12


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer makes scores out of products of queries and keys."""

    scaling: float
    sliding_window: int | None = None  # tokens, the query's own included; None: no limit
    softcap: float | None = None  # c: scores become c tanh(score / c); None: they stay


def causal_attention(
    query: Tensor,  # [heads, queries, head size]: the last rows of the sequence
    key: Tensor,  # [key heads, keys, head size]
    value: Tensor,  # [key heads, keys, value size]
    scores: Scores,
) -> Tensor:  # [heads, queries, value size]
    """Attention of one sequence whose last `queries` positions ask.

    Under autograd it keeps what is linear in the sequence: where there is a mask or a cap, blocks
    of queries are computed one by one, and again in backward.
    """
    queries, keys = query.shape[1], key.shape[1]
    window = scores.sliding_window if scores.sliding_window and scores.sliding_window < keys else 0
    if queries == 1 and window:
        key, value = key[:, -window:], value[:, -window:]
    if scores.softcap is None and (queries == 1 or (queries == keys and not window)):
        return _fused(query, key, value, None, scores)
    compute: Callable[..., Tensor] = _block
    if torch.is_grad_enabled():
        compute = partial(checkpoint, _block, use_reentrant=False, preserve_rng_state=False)
    blocks = _blocks(query, key, value, scores, window)
    return torch.cat([compute(*block, scores) for block in blocks], dim=1)


def _blocks(
    query: Tensor, key: Tensor, value: Tensor, scores: Scores, window: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, and the keys and values that they see; the queries are the last of the keys."""
    heads, queries, _ = query.shape
    before = key.shape[1] - queries
    size = max(16, min(MOST_BLOCK_QUERIES, BLOCK_BYTES // (4 * heads * key.shape[1])))
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        seen = slice(max(0, before + start - window + 1) if window else 0, before + stop)
        yield query[:, start:stop], key[:, seen], value[:, seen]


def _block(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    mask = _mask(query.shape[1], key.shape[1], scores.sliding_window, query.device)
    if scores.softcap is None:
        return _fused(query, key, value, mask, scores)
    heads, queries, _ = query.shape
    grouped = query.reshape(key.shape[0], -1, *query.shape[1:])  # [key heads, group, queries, size]
    products = grouped @ key[:, None].transpose(-1, -2) * scores.scaling
    capped = (products / scores.softcap).tanh() * scores.softcap
    weights = capped.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)
    return (weights.to(query.dtype) @ value[:, None]).reshape(heads, queries, -1)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores
) -> Tensor:
    return functional.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=mask is None and query.shape[1] > 1,
        scale=scores.scaling,
        enable_gqa=query.shape[0] != key.shape[0],
    )[0]


def long_causal_attention(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """`causal_attention` by the kernel that is best for one long document on an accelerator.

    cuDNN's backward is two to three times as fast as FlashAttention 2's; it makes a plan for each
    length that it meets, which many short ones would not pay for. It is not deterministic, and
    steps back by itself where that is asked for.
    """
    with sdpa_kernel(_PRIORITY, set_priority=True):
        return causal_attention(query, key, value, scores)


def _mask(
    queries: int, keys: int, window: int | None, device: torch.device
) -> Tensor:  # [queries, keys]
    at = torch.arange(keys - queries, keys, device=device)[:, None]
    seen = torch.arange(keys, device=device)[None]
    mask = seen <= at
    return mask if window is None else mask & (seen > at - window)


def varlen_fits(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> bool:
    """Whether `varlen_attention` computes these: FlashAttention 2's limits."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and scores.softcap is None
        and query.shape[2] == key.shape[2] == value.shape[2]
        and query.shape[2] % 8 == 0
        and query.shape[2] <= 256
    )


def varlen_attention(
    query: Tensor,  # [heads, tokens, head size]
    key: Tensor,  # [key heads, tokens, head size]
    value: Tensor,  # [key heads, tokens, head size]
    bounds: Tensor,  # [documents + 1] int32, of the documents in the tokens
    longest: int,  # tokens of the longest document
    scores: Scores,
) -> Tensor:  # [heads, tokens, head size]
    """Attention of many documents in one kernel. On CUDA alone; `causal_attention` of each is its
    oracle.
    """
    window = scores.sliding_window
    # torch 2.11 takes fewer key heads without being told.
    options: dict[str, Any] = {"enable_gqa": True} if _VARLEN_GROUPS_HEADS else {}
    output = varlen_attn(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        bounds,
        bounds,
        longest,
        longest,
        scale=scores.scaling,
        window_size=(-1 if window is None or window >= longest else window - 1, 0),
        **options,
    )
    assert isinstance(output, Tensor)  # and not a tuple: no auxiliary output was asked for
    return output.transpose(0, 1)
