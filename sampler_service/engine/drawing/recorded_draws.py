"""Draws over tensors that stay where they are, beside the recorded passes whose logits they read:
one copy there, one launch, one copy back. For rows that nothing narrows, bends or looks into.

n: rows. V: vocabulary size.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mint_core.model.recordings import Inputs, Recorder, Recordings
from sampler_service.engine.drawing.narrowing import narrows
from sampler_service.engine.drawing.randomness import Draw, uniforms
from sampler_service.engine.drawing.sums import PLAIN, Sums
from sampler_service.engine.drawing.token_draws import DrawnTokens, draw_plain


class RecordedDraws:
    """Of the first rows of the logits."""

    def __init__(
        self,
        logits: Tensor,  # [most rows, V]
        recorder: Recorder | None,
        sums: Sums = PLAIN,
    ) -> None:
        self._logits = logits
        self._sums = sums
        self._recordings = Recordings(recorder)
        most = (len(logits),)
        self._inputs = Inputs(
            {
                "uniform": (torch.float64, most),
                "temperatures": (torch.float32, most),
                "cold": (torch.int64, most),  # 1: the likeliest token
            },
            logits.device,
        )
        # Tokens, both logprobs, and whether all is finite: a float64 holds any of them.
        self._outputs = torch.zeros(4, *most, dtype=torch.float64, device=logits.device)

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> DrawnTokens | None:
        """A token for each row of `logits`; None if it takes more than is recorded."""
        vocabulary = logits.shape[1]
        if logits.data_ptr() != self._logits.data_ptr() or not all(
            _plain(draw, vocabulary) for draw in draws
        ):
            return None
        count = len(draws)
        size = min(1 << (count - 1).bit_length(), len(self._logits))
        host = self._inputs.host
        host["uniform"][:count] = uniforms(draws)
        host["temperatures"][:] = 1.0
        host["temperatures"][:count] = [draw.choice.temperature or 1.0 for draw in draws]
        host["cold"][:count] = [draw.choice.temperature == 0 for draw in draws]
        self._inputs.send()
        self._recordings.run_anyhow(size, partial(self._compute, size))
        tokens, logprobs, model_logprobs, finite = self._outputs[:, :count].cpu().numpy()
        return DrawnTokens(
            tokens.astype(np.int64),
            logprobs.astype(np.float32),
            model_logprobs.astype(np.float32),
            finite > 0,
            np.zeros((count, 0), np.int64),
            np.zeros((count, 0), np.float32),
        )

    def _compute(self, size: int) -> None:
        given = {name: values[:size] for name, values in self._inputs.device.items()}
        drawn = draw_plain(
            self._logits[:size],
            given["temperatures"],
            given["cold"] > 0,
            given["uniform"],
            self._sums,
        )
        self._outputs[:, :size] = torch.stack([each.double() for each in drawn])


def _plain(draw: Draw, vocabulary: int) -> bool:
    return not (draw.topk or draw.bends or narrows(draw.choice, vocabulary))
