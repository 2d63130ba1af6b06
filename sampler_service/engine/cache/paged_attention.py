"""Attention of a pass in which every row is the last token of a sequence of its own.

n: sequences. Nothing here is read on the host, and no shape follows from what tensors hold: a pass
can be captured in a CUDA graph.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mint_core.model.attention_kernels import Scores
from mint_core.model.mixers.mixer import Inputs, Mixer
from sampler_service.engine.cache.kv_cache import KvCache

# (query [n, heads, key size], keys and values of a layer [blocks, block tokens, key heads, size],
# block table [n, most blocks], lengths [n], scores) -> [n, heads, value size]
DecodeAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Scores], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class PagedAttention:
    """Each row enters its sequence's cache and attends to it."""

    cache: KvCache
    compute: DecodeAttention
    slots: Tensor  # [n] where keys and values of the rows go
    table: Tensor  # [n, most blocks] int32, of each sequence
    lengths: Tensor  # [n] tokens of each sequence, the row included
    states: Tensor  # [n] slots of the sequences' states

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        self.cache.write(layer_index, self.slots, key, value)
        keys, values = self.cache.layer(layer_index)
        output = self.compute(query.transpose(0, 1), keys, values, self.table, self.lengths, scores)
        return output.transpose(0, 1)

    def attend_whole(
        self,
        layer_index: int,
        heads: Tensor,  # [n, heads, size] of queries, keys and values, side by side
        turns: tuple[Tensor, Tensor],  # see `shortcuts.turn`
        norm: tuple[Tensor, float] | None,  # of queries and keys, weight [heads, size] and epsilon
        scores: Scores,
    ) -> Tensor:  # [n, query heads, size]
        """The same from what is neither normed nor turned yet, by kernels alone."""
        from mint_core.model.fused.head_kernels import Kept, turned  # Triton is not everywhere

        keys, values = self.cache.layer(layer_index)
        kept = Kept(keys.flatten(0, 1), values.flatten(0, 1), self.slots)
        query = turned(heads, *turns, norm, kept=kept)
        return self.compute(query, keys, values, self.table, self.lengths, scores)

    def mix(self, layer_index: int, mixer: Mixer, inputs: Inputs) -> Tensor:
        states = self.cache.states
        output, after = mixer.step(inputs, states.read(layer_index, self.states))
        states.write(layer_index, self.states, after)
        return output


def plain_attention(
    query: Tensor,  # [n, heads, key size]
    key: Tensor,  # [blocks, block tokens, key heads, key size]
    value: Tensor,  # [blocks, block tokens, key heads, value size]
    table: Tensor,  # [n, most blocks]
    lengths: Tensor,  # [n], at least 1
    scores: Scores,
) -> Tensor:  # [n, heads, value size]
    """What the kernels of paged_kernels.py compute, by whole matrices in float32: their oracle, and
    where there is no GPU their stand-in.
    """
    keys, values = (part[table].flatten(1, 2).float() for part in (key, value))
    at = torch.arange(keys.shape[1], device=query.device)
    seen = at < lengths[:, None]  # [n, tokens]
    if scores.sliding_window is not None:
        seen = seen & (at >= lengths[:, None] - scores.sliding_window)
    grouped = query.float().unflatten(1, (key.shape[2], -1))  # [n, key heads, group, key size]
    products = torch.einsum("nhgs,nths->nhgt", grouped, keys) * scores.scaling
    if scores.softcap is not None:
        products = (products / scores.softcap).tanh() * scores.softcap
    weights = products.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    # What lies beyond a sequence may be anything, NaN too.
    values = values.where(seen[:, :, None, None], 0.0)
    return torch.einsum("nhgt,nths->nhgs", weights, values).flatten(1, 2).to(query.dtype)
