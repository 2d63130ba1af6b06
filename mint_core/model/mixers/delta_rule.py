"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks"), in chunks.

A sequence's state S [k, v] recalls values by keys. Each row lets it fade and corrects what it
recalls: S <- exp(g) S; S <- S + key (beta (value - S^T key))^T; the row gets S^T query.

The rows of a chunk are computed together. With G the sums of g up to each row and S the state
before the chunk, what its rows write is the solution U of
    (I + N) U = beta (V - e^G K S),  N[i, j] = beta[i] (K K^T)[i, j] e^(G[i] - G[j]) for j < i,
its rows get e^G Q S + (Q K^T e^(G[i] - G[j]) for j <= i) U, and the state after it is
e^G[last] S + (e^(G[last] - G) K)^T U. Exponents are never above 0.

Mamba 2 (Dao and Gu 2024, "Transformers are SSMs") has the same without the correction: a row writes
beta times its value, whatever the state recalls, so that U = beta V.

R: rows of all chunks. m: sequences that have a chunk in a step, of N in all steps. h: heads.
C: rows of a chunk.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mint_core.model.mixers.runs import Runs

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of what a step is made of, in order


def recalled(
    heads: Sequence[Tensor],  # queries, keys, values, each [R, h, ...], chunk after chunk
    fading: Tensor,  # [R, h]
    rates: Tensor,  # [R, h]
    runs: Runs,
    state: Tensor | None,  # [D, h, k, v] with which the runs begin; None: zeros
    *,
    corrects: bool = True,
) -> tuple[Tensor, Tensor | None]:  # [T, h v]; states after the runs, None without `state`
    """What the rows of a stream get."""
    chunks, outputs, after = runs.chunks, [], []
    sizes = [group.rows for group in chunks.groups]
    parts = zip(*(x.split(sizes) for x in (*heads, fading, rates)), strict=True)
    for group, own in zip(chunks.groups, parts, strict=True):
        q, k, v, g, beta = (
            x.unflatten(0, (-1, group.length)).transpose(1, 2).contiguous() for x in own
        )
        if group.fillers is not None:
            g, beta = g.masked_fill(group.fillers, 0.0), beta.masked_fill(group.fillers, 0.0)
        before = None if state is None else state.index_select(0, group.runs)
        output, ended = delta_rule((q, k, v, g, beta), group.counts, before, corrects=corrects)
        outputs.append(output.transpose(1, 2).flatten(2).flatten(0, 1))
        if ended is not None:
            after.append(ended)
    joined = chunks.join(outputs[0] if len(outputs) == 1 else torch.cat(outputs))
    return joined, torch.cat(after).index_select(0, chunks.order) if after else None


def delta_rule(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    counts: Sequence[int],  # of each step's chunks
    state: Tensor | None = None,  # [counts[0], h, k, v]; None: zeros
    *,
    corrects: bool = True,
) -> tuple[Tensor, Tensor | None]:  # [N, h, C, v]; states after the sequences, None without `state`
    """What the rows of chunks get, step after step; in a step the sequences with most chunks come
    first. `inputs`: queries [N, h, C, k], keys, values [N, h, C, v], g and beta [N, h, C], both 0
    in rows that only fill up. Gradients reach all of them, and not the state.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        assert state is None, "gradients do not reach back beyond the pass"
        return _DeltaRule.apply(*inputs, counts, corrects), None  # type: ignore[no-untyped-call]
    return _run(inputs, counts, state, corrects)


@torch.no_grad()
def delta_step(
    queries: Tensor,  # [n, h, k]
    keys: Tensor,  # [n, h, k]
    values: Tensor,  # [n, h, v]
    kept: Tensor,  # [n, h], exp(g)
    rates: Tensor,  # [n, h]
    state: Tensor,  # [n, h, k, v], overwritten
    *,
    corrects: bool = True,
) -> Tensor:  # [n, h, v]
    """One row of each sequence, as in the definition. `state` is the one after it."""
    kept = kept[..., None, None]
    # Both are read from the state before: what it recalls for the key, and for the query.
    read = _times(torch.stack([keys, queries], dim=2), state) * kept
    wrong = values - read[:, :, 0] if corrects else values
    written = wrong * rates[..., None]
    state.mul_(kept).addcmul_(keys[..., None], written[:, :, None])
    return (queries * keys).sum(-1, keepdim=True).mul(written).add_(read[:, :, 1])


def _run(
    inputs: Sequence[Tensor],
    counts: Sequence[int],
    state: Tensor | None,
    corrects: bool,
    steps: "list[_Step] | None" = None,  # kept, where backward wants them
) -> tuple[Tensor, Tensor | None]:
    outputs, ended = [], []
    with_states = state is not None
    q, k, v, g, beta = (x.split(list(counts)) for x in inputs)
    for i, (count, going_on) in enumerate(itertools.pairwise([*counts, 0])):
        step = _Step(q[i], k[i], v[i], g[i], beta[i], corrects)
        outputs.append(step.forward(state))
        if with_states:
            after = step.state_after(count)
            ended.append(after[going_on:])
            state = after[:going_on]
        elif going_on:
            state = step.state_after(going_on)
        if steps is not None:
            steps.append(step)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    # The longest sequences come first and end last.
    return output, torch.cat(ended[::-1]) if with_states else None


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        counts: Sequence[int],
        corrects: bool,
    ) -> Tensor:
        # Not saved tensor by tensor: this is always recomputed (mixer.py), right before backward.
        ctx.steps = []
        return _run((q, k, v, g, beta), counts, None, corrects, ctx.steps)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        counts = [len(step.keys) for step in ctx.steps]
        upstream = gradients[0].split(counts)
        found: list[Gradients] = []
        state = None
        while ctx.steps:
            own, state = ctx.steps.pop().backward(upstream[len(ctx.steps)], state)
            found.append(own)
        return *(torch.cat(parts) for parts in zip(*found[::-1], strict=True)), None, None


@dataclass(eq=False)
class _Step:
    """One chunk of each of m sequences."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    fading: Tensor
    rates: Tensor
    corrects: bool

    def forward(self, state: Tensor | None) -> Tensor:  # [m, h, k, v] -> [m, h, C, v]
        self.state = state
        sums = self.fading.cumsum(-1)
        later = _later_rows(sums.shape[-1], sums.device)
        differences = sums[..., None] - sums[..., None, :]
        self.fades = differences.masked_fill_(later, -torch.inf).exp_()  # [m, h, C, C]
        self.powers = sums.exp()[..., None]  # [m, h, C, 1], e^G
        self.rest = (sums[..., -1:] - sums).exp()[..., None]  # [m, h, C, 1], e^(G[last] - G)
        self.beta = self.rates[..., None]
        turned = self.keys.mT
        self.scores = _times(self.queries, turned).mul_(self.fades)
        self.wrong = self.values  # what of them the state does not recall already
        if self.corrects and state is not None:
            self.wrong = self.values - self.powers * _times(self.keys, state)
        self.written = self.wrong * self.beta
        if self.corrects:
            self.likeness = _times(self.keys, turned).mul_(self.fades)  # N, but for beta
            self.written = torch.linalg.solve_triangular(
                self.likeness * self.beta, self.written, upper=False, unitriangular=True
            )
        output = _times(self.scores, self.written)
        if state is not None:
            self.recalled = self.powers * _times(self.queries, state)
            output += self.recalled
        return output

    def state_after(self, count: int) -> Tensor:
        """Of the first so many sequences."""
        after = _times((self.keys * self.rest)[:count].mT, self.written[:count])
        if self.state is not None:
            after.addcmul_(self.state[:count], self._last(count))
        return after

    def _last(self, count: int) -> Tensor:  # [count, h, 1, 1]
        return self.powers[:count, :, -1:]

    def backward(
        self,
        upstream: Tensor,  # [m, h, C, v]
        state_after: Tensor | None,  # gradient, of the first sequences alone; None: of none
    ) -> tuple[Gradients, Tensor | None]:  # and of the state before
        written = _times(self.scores.mT, upstream)  # gradients, all of them, by what they are of
        count = 0 if state_after is None else len(state_after)
        if state_after is not None:
            written[:count] += _times((self.keys * self.rest)[:count], state_after)
        scores = _times(upstream, self.written.mT)
        along = scores * self.scores
        scores.mul_(self.fades)
        queries, keys = _times(scores, self.keys), _times(scores.mT, self.queries)
        if self.corrects:
            written = torch.linalg.solve_triangular(
                (self.likeness * self.beta).mT, written, upper=True, unitriangular=True
            )
        rates = (written * self.wrong).sum(-1)
        if self.corrects:
            likeness = _times(written, self.written.mT).neg_().tril_(-1)
            rates += (likeness * self.likeness).sum(-1)
            likeness.mul_(self.beta)
            along.addcmul_(likeness, self.likeness)
            likeness.mul_(self.fades)
            keys += _times(likeness + likeness.mT, self.keys)
        sums = along.sum(-1).sub_(along.sum(-2))
        values = written * self.beta
        state = self._through_state(upstream, values, queries, keys, sums)
        if state_after is not None:
            self._through_end(state_after, keys, sums, state)
        fading = sums.flip(-1).cumsum(-1).flip(-1)
        return (queries, keys, values, fading, rates), state

    def _through_state(
        self,
        upstream: Tensor,
        wrong: Tensor,  # gradient, as all that follow
        queries: Tensor,  # added to, as those that follow
        keys: Tensor,
        sums: Tensor,
    ) -> Tensor | None:
        """By what the rows read from the state before. Returns its gradient."""
        if self.state is None:
            return None
        turned = self.state.mT
        by_query = self.powers * upstream
        queries += _times(by_query, turned)
        sums += (upstream * self.recalled).sum(-1)
        state = _times(self.queries.mT, by_query)
        if self.corrects:
            by_key = (self.powers * wrong).neg_()
            keys += _times(by_key, turned)
            sums += (wrong * (self.wrong - self.values)).sum(-1)
            state += _times(self.keys.mT, by_key)
        return state

    def _through_end(self, after: Tensor, keys: Tensor, sums: Tensor, state: Tensor | None) -> None:
        """By the state after, which the first sequences go on with. Adds to the others."""
        count = len(after)
        ends = _times(self.written[:count], after.mT).mul_(self.rest[:count])
        keys[:count] += ends
        shares = (ends * self.keys[:count]).sum(-1)  # [count, h, C]
        sums[:count] -= shares
        last = shares.sum(-1)
        if self.state is not None:
            assert state is not None
            last += (self.state[:count] * after).flatten(2).sum(-1) * self._last(count)[..., 0, 0]
            state[:count].addcmul_(after, self._last(count))
        sums[:count, :, -1] += last


def _later_rows(length: int, device: torch.device) -> Tensor:  # [C, C]
    return torch.ones(length, length, dtype=torch.bool, device=device).triu_(1)


def _times(left: Tensor, right: Tensor) -> Tensor:  # [m, h, a, b], [m, h, b, c] -> [m, h, a, c]
    """Products whose bits do not depend on how many they are: one alone goes another way in MKL."""
    if left.shape[0] * left.shape[1] == 1 and left.is_cpu:
        return torch.matmul(left.expand(2, -1, -1, -1), right.expand(2, -1, -1, -1))[:1]
    return torch.matmul(left, right)
