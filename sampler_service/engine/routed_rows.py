"""The experts that a request's tokens went to, noted as they are computed.

L: layers that have experts. k: experts of a token.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sampler_service.engine.sequences import PROMPT
from sampler_service.jobs import Routed


class RoutedRows:
    """Of one request. What is computed again, since its blocks were taken, is as it was."""

    def __init__(self, prompt_tokens: int, samples: int) -> None:
        self._before = prompt_tokens - 1  # tokens that are the prompt's own sequence
        self._prompt: list[Routed] = []  # [L, k] each, and so the next
        self._samples: list[list[Routed]] = [[] for _ in range(samples)]

    def note(self, index: int, start: int, rows: Routed) -> None:
        """Of a sequence, by its index, the tokens from position `start` on."""
        own, at = self._prompt, start
        if index != PROMPT:
            own, at = self._samples[index], start - self._before
        own.extend(rows[max(0, len(own) - at) :])

    @property
    def prompt(self) -> Routed:
        """[prompt - 1, L, k]."""
        shape = self._samples[0][0].shape
        return np.stack(self._prompt) if self._prompt else np.empty((0, *shape), np.uint16)

    def sample(self, index: int) -> Routed:  # [generated, L, k]
        return np.stack(self._samples[index])


def stacked(chosen: Sequence[Tensor]) -> Routed:  # [rows, k] of each layer -> [rows, L, k]
    return torch.stack(list(chosen), 1).cpu().numpy().astype(np.uint16)
