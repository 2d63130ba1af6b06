"""The softmax of logits: logprobs of targets, and the gradient with respect to the logits; and
which logits are the largest.

n: rows. V: vocabulary size. k: targets of a row.
"""

import numpy as np
import torch
from torch import Tensor

_IDS = 2**32 - 1  # more than a vocabulary has


class PlainSoftmax:
    """In float32, step by step. Overwrites the logits."""

    def __init__(self, z: Tensor) -> None:  # [n, V] float32
        self._largest = z.amax(1)  # [n]
        self._powers = z.sub_(self._largest[:, None]).exp_()  # [n, V]
        self._totals = self._powers.sum(1)  # [n]

    def logprobs(self, at_target: Tensor) -> Tensor:  # [n, k] -> [n, k] float32
        """From the logits of targets, as they were."""
        return at_target - self._largest[:, None] - self._totals.log()[:, None]

    def gradient(self, rows: Tensor | None, targets: Tensor, upstream: Tensor) -> Tensor:
        """upstream * (onehot(target) - softmax), summed over a row's targets, both [m, k], of m
        rows, or of all; [m, V]. Asked for once.
        """
        z, totals = self._powers, self._totals
        if rows is not None:
            z, totals = z[rows], totals[rows]
        z.mul_(-(_row_sums(upstream) / totals)[:, None])
        return z.scatter_add_(1, targets, upstream)


class KernelSoftmax:
    """The same in kernels, of logits in whatever type: they are read twice and written once."""

    def __init__(self, z: Tensor) -> None:  # [n, V]
        from mint_core.model.fused.softmax_kernels import logsums  # Triton is not everywhere

        self._z = z
        self._logsums = logsums(z)

    def logprobs(self, at_target: Tensor) -> Tensor:
        """See PlainSoftmax."""
        return at_target.float() - self._logsums[:, None]

    def gradient(self, rows: Tensor | None, targets: Tensor, upstream: Tensor) -> Tensor:
        """See PlainSoftmax."""
        from mint_core.model.fused.softmax_kernels import to_gradient

        z, logsums = self._z, self._logsums
        if rows is not None:
            z, logsums = z[rows], logsums[rows]
        to_gradient(z, logsums, targets, upstream)
        return z


Softmax = PlainSoftmax | KernelSoftmax


def _row_sums(values: Tensor) -> Tensor:  # [n, k] -> [n]
    """Column after column: a row's sum does not depend on how many rows there are."""
    if values.is_cpu and len(values) > 1:  # the same sums in one call: k may be the vocabulary's
        return torch.from_numpy(np.add.reduce(values.t().contiguous().numpy(), axis=0))
    total = values[:, 0]
    for column in range(1, values.shape[1]):
        total = total + values[:, column]
    return total


def ranked_exactly(scores: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """The largest of each row [n, V] float32 and their ids, both [n, ranks], of equal ones the
    smaller id first, also where some of them are beyond the last rank: torch leaves that open.
    """
    bits = (scores + 0.0).view(torch.int32).long()  # of one zero
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(scores.shape[1], device=scores.device)
    top = ((order << 32) | (_IDS - ids)).topk(ranks, dim=1).values
    chosen = _IDS - (top & _IDS)
    return scores.gather(1, chosen), chosen
