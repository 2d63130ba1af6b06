"""Triton kernels of what is done to heads before attention. Import this where Triton is there.

T: rows of the stream. h: heads. s: head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

HEADS = 8  # of a program


@triton.jit
def turn(
    heads,  # [T, h, s]
    cosines,  # [T, s]
    sines,  # [T, s], of the first half negative
    weight,  # [h, s] of the norm
    output,  # [T, h, s], of queries alone if the others are kept
    keys,  # [slots, key heads, s]
    values,  # as keys
    slots,  # [T] where they go
    eps,
    query_count,
    turned_count,
    count,
    row,
    head,
    turn_row,
    SIZE: tl.constexpr,
    ROOM: tl.constexpr,  # half the size, filled up to a power of two
    HEADS: tl.constexpr,
    NORMED: tl.constexpr,
    KEEPS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    place = tl.arange(0, ROOM)
    inside = place < SIZE // 2
    there = (which < count)[:, None] & inside[None, :]
    at = heads + token * row + which[:, None] * head + place[None, :]
    left = tl.load(at, mask=there, other=0.0).to(tl.float32)
    right = tl.load(at + SIZE // 2, mask=there, other=0.0).to(tl.float32)
    if KEEPS:
        slot = tl.load(slots + token)
        key_heads = turned_count - query_count
        stays = (which >= turned_count)[:, None] & there
        to = values + (slot * key_heads + which[:, None] - turned_count) * SIZE + place[None, :]
        tl.store(to, left, mask=stays)
        tl.store(to + SIZE // 2, right, mask=stays)
        there = (which < turned_count)[:, None] & inside[None, :]
    if NORMED:
        squares = tl.sum(left * left, 1) + tl.sum(right * right, 1)
        scales = tl.rsqrt(squares / SIZE + eps)[:, None]
        own = weight + which[:, None] * SIZE + place[None, :]
        left *= scales * tl.load(own, mask=there, other=0.0).to(tl.float32)
        right *= scales * tl.load(own + SIZE // 2, mask=there, other=0.0).to(tl.float32)
    angle = token * turn_row + place
    cosine_left = tl.load(cosines + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
    cosine_right = tl.load(cosines + angle + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    sine_left = tl.load(sines + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
    sine_right = tl.load(sines + angle + SIZE // 2, mask=inside, other=0.0).to(tl.float32)[None, :]
    turned_left = left * cosine_left + right * sine_left
    turned_right = right * cosine_right[None, :] + left * sine_right
    if KEEPS:
        answers = (which >= query_count)[:, None] & there
        to = keys + (slot * key_heads + which[:, None] - query_count) * SIZE + place[None, :]
        tl.store(to, turned_left, mask=answers)
        tl.store(to + SIZE // 2, turned_right, mask=answers)
        there = (which < query_count)[:, None] & inside[None, :]
    to = output + (token * query_count + which[:, None]) * SIZE + place[None, :]
    tl.store(to, turned_left, mask=there)
    tl.store(to + SIZE // 2, turned_right, mask=there)


@dataclass(frozen=True, slots=True)
class Kept:
    """Where keys and values go."""

    keys: Tensor  # [slots, key heads, s], dense
    values: Tensor  # as keys
    slots: Tensor  # [T]


def turned(
    heads: Tensor,  # [T, h, s]
    cosines: Tensor,  # [T, 1, s]
    sines: Tensor,  # [T, 1, s], of the first half negative
    # Of what is turned, weight [turned heads, s] and epsilon, applied first.
    norm: tuple[Tensor, float] | None = None,
    kept: Kept | None = None,
) -> Tensor:  # [T, h, s]
    """Heads turned by rotary embeddings. With `kept` they are queries, keys and values, side by
    side, of which the queries are returned; values stay as they are.
    """
    if heads.shape[::2] != cosines.shape[::2] or heads.shape[2] % 2:
        raise ValueError(f"{list(cosines.shape)} does not turn {list(heads.shape)}")
    heads = heads if heads.stride(2) == 1 else heads.contiguous()
    cosines, sines = cosines.contiguous(), sines.contiguous()
    tokens, count, size = heads.shape
    key_heads = kept.keys.shape[1] if kept else 0
    queries = count - 2 * key_heads
    output = heads.new_empty(tokens, queries, size)
    weight, eps = norm or (cosines, 0.0)
    places = (kept.keys, kept.values, kept.slots) if kept else (heads, heads, heads)
    turn[(tokens, triton.cdiv(count, HEADS))](
        heads,
        cosines,
        sines,
        weight,
        output,
        *places,
        eps,
        queries,
        queries + key_heads,
        count,
        heads.stride(0),
        heads.stride(1),
        cosines.stride(0),
        SIZE=size,
        ROOM=triton.next_power_of_2(size // 2),
        HEADS=HEADS,
        NORMED=norm is not None,
        KEEPS=kept is not None,
        num_warps=4,
    )
    return output


@triton.jit
def turn_back(
    heads,  # [T, h, s], as they were before
    queries,  # gradients, each [its heads, T, s]
    keys,
    values,
    cosines,  # [T, s]
    sines,  # [T, s], of the first half negative
    weight,  # [h, s] of the norm
    output,  # [T, h, s]
    eps,
    query_count,
    turned_count,
    count,
    heads_row,
    query_head,
    query_row,
    key_head,
    key_row,
    value_head,
    value_row,
    turn_row,
    SIZE: tl.constexpr,
    ROOM: tl.constexpr,  # half the size, filled up to a power of two
    HEADS: tl.constexpr,
    NORMED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    place = tl.arange(0, ROOM)
    inside = (place < SIZE // 2)[None, :]
    asks = which < query_count
    answers = (which >= query_count) & (which < turned_count)
    stays = (which >= turned_count) & (which < count)
    query = queries + which[:, None] * query_head + token * query_row + place[None, :]
    key = keys + (which - query_count)[:, None] * key_head + token * key_row + place[None, :]
    value = values + (which - turned_count)[:, None] * value_head + token * value_row
    value += place[None, :]
    left = tl.load(query, mask=asks[:, None] & inside, other=0.0).to(tl.float32)
    left += tl.load(key, mask=answers[:, None] & inside, other=0.0).to(tl.float32)
    right = tl.load(query + SIZE // 2, mask=asks[:, None] & inside, other=0.0).to(tl.float32)
    right += tl.load(key + SIZE // 2, mask=answers[:, None] & inside, other=0.0).to(tl.float32)
    angle = token * turn_row + place[None, :]
    cosine_left = tl.load(cosines + angle, mask=inside, other=0.0).to(tl.float32)
    cosine_right = tl.load(cosines + angle + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    sine_left = tl.load(sines + angle, mask=inside, other=0.0).to(tl.float32)
    sine_right = tl.load(sines + angle + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    back_left = left * cosine_left + right * sine_right
    back_right = right * cosine_right + left * sine_left
    if NORMED:
        there = (which < turned_count)[:, None] & inside
        at = heads + token * heads_row + which[:, None] * SIZE + place[None, :]
        old_left = tl.load(at, mask=there, other=0.0).to(tl.float32)
        old_right = tl.load(at + SIZE // 2, mask=there, other=0.0).to(tl.float32)
        own = weight + which[:, None] * SIZE + place[None, :]
        back_left *= tl.load(own, mask=there, other=0.0).to(tl.float32)
        back_right *= tl.load(own + SIZE // 2, mask=there, other=0.0).to(tl.float32)
        squares = tl.sum(old_left * old_left, 1) + tl.sum(old_right * old_right, 1)
        scales = tl.rsqrt(squares / SIZE + eps)[:, None]
        # d scale / d x = - scale^3 x / size
        along = (tl.sum(back_left * old_left, 1) + tl.sum(back_right * old_right, 1))[:, None]
        along *= scales * scales * scales / SIZE
        back_left = back_left * scales - old_left * along
        back_right = back_right * scales - old_right * along
    back_left += tl.load(value, mask=stays[:, None] & inside, other=0.0).to(tl.float32)
    back_right += tl.load(value + SIZE // 2, mask=stays[:, None] & inside, other=0.0).to(tl.float32)
    to = output + (token * count + which[:, None]) * SIZE + place[None, :]
    tl.store(to, back_left, mask=(which < count)[:, None] & inside)
    tl.store(to + SIZE // 2, back_right, mask=(which < count)[:, None] & inside)


def turned_back(
    heads: Tensor,  # [T, h, s] of queries, keys and values, as they were before
    gradients: Sequence[Tensor],  # of what became of each, [its heads, T, s]
    cosines: Tensor,  # [T, 1, s]
    sines: Tensor,  # [T, 1, s], of the first half negative
    norm: tuple[Tensor, float] | None,  # of queries and keys, weight [heads, s] and epsilon
) -> Tensor:  # [T, h, s]
    """The gradient of all heads side by side."""
    dense = [g if g.stride(2) == 1 else g.contiguous() for g in gradients]
    cosines, sines = cosines.contiguous(), sines.contiguous()
    tokens, count, size = heads.shape
    assert heads.stride()[1:] == (size, 1)
    output = heads.new_empty(tokens, count, size)
    weight, eps = norm or (cosines, 0.0)
    queries, keys, _ = (len(gradient) for gradient in gradients)
    strides = [stride for gradient in dense for stride in gradient.stride()[:2]]
    turn_back[(tokens, triton.cdiv(count, HEADS))](
        heads,
        *dense,
        cosines,
        sines,
        weight,
        output,
        eps,
        queries,
        queries + keys,
        count,
        heads.stride(0),
        *strides,
        cosines.stride(0),
        SIZE=size,
        ROOM=triton.next_power_of_2(size // 2),
        HEADS=HEADS,
        NORMED=norm is not None,
        num_warps=4,
    )
    return output
