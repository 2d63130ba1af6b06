"""Models of random weights in Qwen3's shapes, made on the device itself: on a lent machine every
second counts, and weights change no speed. And what else the parts of the checklist share.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

from mint_core.model import loading
from mint_core.model.architecture import text_part
from tests.models import write_tokenizer

_QWEN3 = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8, "eos_token_id": 2}
CONFIGS = {
    "tiny": Qwen3Config(
        vocab_size=512,
        head_dim=16,
        num_key_value_heads=2,
        eos_token_id=2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    ),
    "0.6B": Qwen3Config(
        **_QWEN3,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "8B": Qwen3Config(
        **_QWEN3,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
}


@dataclass(frozen=True)
class Bench:
    """Where the parts run, and what they have found."""

    device: torch.device
    results: Path  # a line of JSON for each figure, written at once

    @property
    def tiny(self) -> bool:
        """Whether this is a rehearsal without a GPU: all sizes are small."""
        return self.device.type == "cpu"

    def size(self, real: int, rehearsed: int) -> int:
        return rehearsed if self.tiny else real

    def note(self, name: str, value: float, unit: str, target: str = "") -> None:
        with self.results.open("a") as file:
            row = {"name": name, "value": value, "unit": unit, "target": target}
            file.write(json.dumps(row) + "\n")
        print(f"{name:64}{value:12.4g} {unit:10} {target}", flush=True)

    def wait(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], repeats: int = 5, warm_up: int = 2) -> float:
        """The median time of a call, its work on the device included."""
        for _ in range(1 if self.tiny else warm_up):
            call()
        times = []
        for _ in range(2 if self.tiny else repeats):
            self.wait()
            started = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - started)
        return sorted(times)[len(times) // 2]

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """By how much a call raises the memory in use at its peak. 0 without a GPU."""
        call()
        if self.tiny:
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def copied_bytes_per_s(bench: Bench) -> float:
    """How fast the device reads and writes, by a copy."""
    numbers = torch.empty(bench.size(2**31, 2**16), dtype=torch.uint8, device=bench.device)
    copy = torch.empty_like(numbers)
    return 2 * numbers.nbytes / bench.seconds(lambda: copy.copy_(numbers), 10)


def random_model(bench: Bench, name: str) -> AbstractContextManager[Path]:
    """A folder that `load_base` takes for this model while the context lasts."""
    return model_of(CONFIGS["tiny" if bench.tiny else name], bench.device)


@contextmanager
def model_of(config: Qwen3Config, device: torch.device) -> Iterator[Path]:
    """The same for a configuration."""

    def read(*_: object) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
        model = make_model(config, device)
        return model, text_part(model), (2,)

    kept = loading._read
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        write_tokenizer(Path(folder))
        loading._read = read
        try:
            yield Path(folder)
        finally:
            loading._read = kept


def make_model(config: Qwen3Config, device: torch.device, attention: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    return model.to(device).eval().requires_grad_(False)
