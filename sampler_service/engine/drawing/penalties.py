"""Penalties on tokens that have occurred, applied to logits before anything is drawn.

Repetition (Keskar et al. 2019, "CTRL", section 4.1, with the signs of transformers): the logit of a
token that occurs in the prompt or in what was generated is divided by the penalty if positive, and
multiplied by it if not.
Then frequency and presence (OpenAI's API reference): the logit of a generated token is lowered by
`frequency_penalty` times its count, and by `presence_penalty` once.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampler_service.jobs import Choice

LARGEST = torch.finfo(torch.float32).max


def penalizes(choice: Choice) -> bool:
    """Whether a choice looks at what has occurred."""
    penalties = (choice.presence_penalty, choice.frequency_penalty)
    return choice.repetition_penalty != 1 or any(penalties)


class Occurrences:
    """The distinct tokens of one sample so far, and how often each was generated."""

    def __init__(self, prompt: NDArray[np.int64]) -> None:  # [any]
        """The prompt's tokens matter to the repetition penalty alone."""
        ids = np.unique(prompt)
        self._places = {token: place for place, token in enumerate(ids.tolist())}
        self._ids = ids
        self._counts = np.zeros(len(ids), np.float32)

    def add(self, token: int) -> None:
        """Takes note of a generated token."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._grow()
        self._ids[place] = token
        self._counts[place] += 1

    def _grow(self) -> None:
        more = max(64, len(self._ids))
        self._ids = np.concatenate([self._ids, np.zeros(more, np.int64)])
        self._counts = np.concatenate([self._counts, np.zeros(more, np.float32)])

    @property
    def ids(self) -> NDArray[np.int64]:  # [distinct]
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.float32]:  # [distinct], 0 for those of the prompt alone
        return self._counts[: len(self._places)]


def penalize(
    logits: Tensor,  # [n, V] float32; changed in place
    rows: Sequence[int],  # [m] which to penalize
    choices: Sequence[Choice],  # [m]
    occurrences: Sequence[Occurrences],  # [m]
) -> None:
    """Applies each row's penalties to its own tokens."""
    lengths = [len(o.ids) for o in occurrences]
    device = logits.device

    def spread(values: Sequence[float], kind: type[np.generic]) -> Tensor:  # [m] -> [tokens]
        return torch.from_numpy(np.repeat(np.array(values, kind), lengths)).to(device)

    row = spread(rows, np.int64)
    ids = torch.from_numpy(np.concatenate([o.ids for o in occurrences])).to(device)
    counts = torch.from_numpy(np.concatenate([o.counts for o in occurrences])).to(device)
    repetition = spread([c.repetition_penalty for c in choices], np.float32)
    frequency = spread([c.frequency_penalty for c in choices], np.float32)
    presence = spread([c.presence_penalty for c in choices], np.float32)
    z = logits[row, ids]
    z = torch.where(z > 0, z / repetition, z * repetition)
    z -= frequency * counts + torch.where(counts > 0, presence, 0.0)
    logits[row, ids] = z.clamp_(-LARGEST, LARGEST)  # what overflowed stays finite
