"""What the sampler's benchmarks sample, our engine in process, and what a user would write with
transformers and PEFT.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.workloads import LORA, SMOLLM2
from mint_core.lora.spec import AdapterArrays
from tests.sampler_in_process import SamplerEngine

FIRST_TOKEN, END_TOKEN = 100, 49_000  # ordinary tokens of SmolLM2
RUNNING = 64  # continuations at the same time, as served by default


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and how many tokens are to follow it, whatever they are."""

    prompt: list[int]
    output_tokens: int


def random_requests(
    count: int, prompts: tuple[int, int], outputs: tuple[int, int], *, seed: int = 0
) -> list[Request]:
    """Lengths evenly spread between both bounds, these included."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            rng.integers(FIRST_TOKEN, END_TOKEN, rng.integers(prompts[0], prompts[1] + 1)).tolist(),
            int(rng.integers(outputs[0], outputs[1] + 1)),
        )
        for _ in range(count)
    ]


def adapter_path(number: int) -> str:
    return f"mint://run-{number}/sampler_weights/bench@1"


class Ours:
    """Our engine with some adapters of rank 16 on all linear layers and the head."""

    def __init__(self, adapters: int, model: Path = SMOLLM2, **settings: object) -> None:
        self.sampler = SamplerEngine(
            model,
            **{"max_running_samples": RUNNING, "kv_cache_tokens": 32_768, **settings},
        )
        for number in range(adapters):
            self.sampler.load(adapter_path(number), LORA, random=number)

    def arrays(self, number: int) -> AdapterArrays:
        return self.sampler.arrays[adapter_path(number)]

    def generate(
        self, requests: Sequence[Request], adapters: Sequence[str], arrive_over_s: float = 0.0
    ) -> list[list[int]]:
        """The likeliest tokens of every request, which come evenly over so many CPU seconds."""
        started = time.process_time()
        numbers: list[int] = []
        while len(numbers) < len(requests) or self.sampler.engine.busy:
            passed = time.process_time() - started
            while len(numbers) < len(requests):
                due_s = arrive_over_s * len(numbers) / len(requests)
                if passed < due_s and self.sampler.engine.busy:
                    break
                request = requests[len(numbers)]
                adapter = adapters[len(numbers) % len(adapters)]
                number = self.sampler.submit(
                    request.prompt,
                    adapter=adapter,
                    max_tokens=request.output_tokens,
                    temperature=0.0,
                )
                numbers.append(number)
            self.sampler.step()
        answers = [self.sampler.answer(number) for number in numbers]
        return [answer.continuations[0].tokens.tolist() for answer in answers]


class Generate:
    """transformers' generate with PEFT adapters: batches padded on the left, each until its longest
    output is there.
    """

    def __init__(self, adapters: Sequence[AdapterArrays], model: Path = SMOLLM2) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        base.generation_config.eos_token_id = None
        self.base = base
        self._model = base
        for number, arrays in enumerate(adapters):
            self._add(number, arrays)

    def _add(self, number: int, arrays: AdapterArrays) -> None:
        modules = sorted({name.split(".")[-3] for name in arrays})
        config = LoraConfig(
            r=LORA.rank, lora_alpha=int(LORA.alpha), target_modules=modules, lora_dropout=0.0
        )
        if isinstance(self._model, PeftModel):
            self._model.add_adapter(str(number), config)
        else:
            self._model = get_peft_model(self._model, config, str(number))
        state = {
            name.replace(".weight", f".{number}.weight"): torch.from_numpy(array.copy())
            for name, array in arrays.items()
        }
        unknown = self._model.load_state_dict(state, strict=False).unexpected_keys
        assert not unknown, unknown
        self._model.eval()

    def use(self, number: int) -> None:
        self._model.set_adapter(str(number))

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], batch_size: int = 8) -> list[list[int]]:
        outputs: list[list[int]] = []
        for at in range(0, len(requests), batch_size):
            outputs += self._batch(requests[at : at + batch_size])
        return outputs

    def _batch(self, requests: Sequence[Request]) -> list[list[int]]:
        longest = max(len(r.prompt) for r in requests)
        tokens = torch.zeros(len(requests), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, request in enumerate(requests):
            tokens[i, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[i, longest - len(request.prompt) :] = 1
        whole = self._model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=max(r.output_tokens for r in requests),
            do_sample=False,
            pad_token_id=0,
        )
        return [
            whole[i, longest : longest + r.output_tokens].tolist() for i, r in enumerate(requests)
        ]


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The share of outputs whose tokens are the same. Below 1 where two tokens are about as likely:
    generate fills up with padding, which changes last bits.
    """
    same = [list(a) == list(b) for a, b in zip(ours, theirs, strict=True)]
    return sum(same) / len(same)
