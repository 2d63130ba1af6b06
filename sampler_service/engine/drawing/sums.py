"""Sums over a vocabulary, and which of it is likeliest. Where a row's must not depend on how many
rows there are, they are sums of whole numbers, which are exact in any order: a GPU's libraries
choose theirs by the number of rows.

n: rows. V: vocabulary size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mint_core.model.softmax import ranked_exactly

UNIT = 2.0**-44  # of the whole numbers: 2**18 numbers of at most 1 are below 2**63


@dataclass(frozen=True, slots=True)
class Sums:
    """How they are computed. What is added up is from 0 to 1."""

    row_wise: bool = False

    def running(self, numbers: Tensor) -> Tensor:  # [n, any] -> [n, any] float64
        """Each with all before it."""
        if self.row_wise:
            return _whole(numbers).cumsum(1).double() * UNIT
        return numbers.double().cumsum(1)

    def running_stretches(self, numbers: Tensor) -> Tensor:
        """[n, stretches, any] -> [n, stretches] float64, each stretch with all before it."""
        if self.row_wise:
            return _whole(numbers).sum(2).cumsum(1).double() * UNIT
        return numbers.sum(2).double().cumsum(1)

    def ranked(self, scores: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
        """The largest scores of each row and their tokens, both [n, ranks], of equal ones the
        smaller id first; of those equal to the last, which are among them is left open, unless
        `row_wise`.
        """
        if self.row_wise:
            return ranked_exactly(scores, ranks)
        if ranks == scores.shape[1]:
            return scores.sort(dim=1, descending=True, stable=True)
        values, ids = scores.topk(ranks, dim=1)  # which leaves the order of equal ones open
        ids, order = ids.sort(dim=1)
        values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
        return values, ids.gather(1, order)


def _whole(numbers: Tensor) -> Tensor:  # int64, in units
    return torch.mul(numbers, 1 / UNIT).long()


PLAIN = Sums()
