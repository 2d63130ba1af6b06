"""What the sampler is asked in the same way on each kind of model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sampler_service.engine.drawing.randomness import Draw, uniforms
from sampler_service.jobs import Choice, Continuation, Generated, StopReason
from tests.models import VOCABULARY_SIZE, own_model
from tests.sampler_in_process import SamplerEngine

# Of cumulated probability: float32 tells no two tokens apart where the draw is so near to what lies
# between them, and passes of another shape may draw the other.
TIE = 3e-6


def random_tokens(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY_SIZE, n).tolist()


def assert_bitwise(left: Generated, right: Generated) -> None:
    for a, b in zip(left.continuations, right.continuations, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.logprobs.tobytes() == b.logprobs.tobytes()
        assert a.model_logprobs.tobytes() == b.model_logprobs.tobytes()
        assert a.stop_reason == b.stop_reason
        if a.topk_logprobs is not None:
            assert b.topk_logprobs is not None
            assert a.topk_logprobs.token_ids.tolist() == b.topk_logprobs.token_ids.tolist()
            assert a.topk_logprobs.logprobs.tobytes() == b.topk_logprobs.logprobs.tobytes()
    if left.prompt_logprobs is not None:
        assert right.prompt_logprobs is not None
        assert left.prompt_logprobs.tobytes() == right.prompt_logprobs.tobytes()


def assert_same_but_for_ties(
    folder: Path, wish: Mapping[str, Any], left: Generated, right: Generated, tolerance: float
) -> None:
    """Both are the base model's, of one wish at temperature 1; samples that part at a tie are
    compared up to there.
    """
    samples = zip(left.continuations, right.continuations, strict=True)
    for number, (a, b) in enumerate(samples):
        n = _parted(a, b)
        if n < len(a.tokens):
            first, last = sorted((int(a.tokens[n]), int(b.tokens[n])))
            logits = _next_logits(folder, [*wish["prompt"], *a.tokens[:n].tolist()])
            cumulated = logits.double().softmax(-1).cumsum(-1)
            (drawn,) = uniforms([Draw(Choice(seed=wish["seed"]), number, n)])
            assert (cumulated[[first, last - 1]] - drawn).abs().max() < TIE
        np.testing.assert_allclose(a.model_logprobs[:n], b.model_logprobs[:n], atol=tolerance)


def _parted(a: Continuation, b: Continuation) -> int:
    """How many tokens are the same from the beginning on."""
    pairs = zip(a.tokens.tolist(), b.tokens.tolist(), strict=False)
    same = next((n for n, (left, right) in enumerate(pairs) if left != right), len(a.tokens))
    assert same < len(a.tokens) or len(a.tokens) == len(b.tokens)
    return same


@torch.no_grad()
def _next_logits(folder: Path, tokens: Sequence[int]) -> torch.Tensor:  # [V]
    logits: torch.Tensor = own_model(folder).eval()(input_ids=torch.tensor([tokens])).logits[0, -1]
    return logits


def bits(generated: Generated) -> list[tuple[bytes, bytes, bytes, StopReason]]:
    return [
        (c.tokens.tobytes(), c.logprobs.tobytes(), c.model_logprobs.tobytes(), c.stop_reason)
        for c in generated.continuations
    ]


def assert_count_changes_no_sample(sampler: SamplerEngine, adapter: str) -> None:
    prompt = random_tokens(9, 37)
    many = sampler.generate(
        prompt, adapter=adapter, num_samples=20, seed=4
    )  # more than run at once
    few = sampler.generate(prompt, adapter=adapter, num_samples=2, seed=4)
    assert_bitwise(few, Generated(continuations=many.continuations[:2]))
    assert len({tuple(c.tokens) for c in many.continuations}) == 20


def assert_greedy_is_generate(
    sampler: SamplerEngine, folder: Path, prompt_tokens: int, atol: float
) -> None:
    """Tokens, and logprobs of prompt and continuation, are those of transformers."""
    prompt = random_tokens(prompt_tokens, prompt_tokens)
    generated = sampler.generate(prompt, temperature=0.0, max_tokens=24, prompt_logprobs=True)
    model = own_model(folder)
    model.generation_config.eos_token_id = None
    whole = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0]
    (continuation,) = generated.continuations
    assert continuation.tokens.tolist() == whole[prompt_tokens:].tolist()
    with torch.no_grad():
        logprobs = model(whole[None]).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, whole[1:, None])[:, 0].numpy()
    assert generated.prompt_logprobs is not None
    got = np.concatenate([generated.prompt_logprobs, continuation.model_logprobs])
    np.testing.assert_allclose(got, expected, atol=atol)


def assert_busy_is_idle(
    sampler: SamplerEngine, wishes: Sequence[Mapping[str, Any]], adapters: Sequence[str]
) -> None:
    """Each wish gets the same bits alone as beside all the others and more that come and go."""
    alone = [sampler.generate(**wish) for wish in wishes]
    numbers = []
    for i, wish in enumerate(wishes):
        numbers.append(sampler.submit(**wish))
        others = sampler.submit(
            random_tokens(50 + i, 20 + 60 * i), adapter=adapters[-i % len(adapters)]
        )
        sampler.step()
        if i % 3 == 0:
            sampler.abort(others)
    together = [sampler.answer(number) for number in numbers]
    sampler.drain()
    for left, right in zip(alone, together, strict=True):
        assert_bitwise(left, right)
