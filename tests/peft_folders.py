"""Adapters that PEFT itself makes and saves, as somebody would bring them along."""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROMPT = (5, 9, 11, 300, 41, 42, 7, 19, 23, 8)


def save_adapter(
    base: Path, folder: Path, *, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Saves an adapter whose A and B are both random."""
    with _no_warnings():
        model = get_peft_model(load(base), LoraConfig(**{"target_modules": ["q_proj"], **config}))
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0.0, 0.05)
        model.to(dtype).save_pretrained(folder)
    return folder


@contextmanager
def _no_warnings() -> Iterator[None]:
    """PEFT warns that a head is tied, and that it saves embedding and head too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )


def peft_logprobs(base: Path, folder: Path, prompt: Sequence[int] = PROMPT) -> list[float]:
    """What PEFT says of all tokens but the first."""
    with _no_warnings():
        return logprobs_of(PeftModel.from_pretrained(load(base), folder), prompt)


@torch.no_grad()
def logprobs_of(model: Any, prompt: Sequence[int] = PROMPT) -> list[float]:
    tokens = torch.tensor([prompt])
    scores = model.eval()(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
    found: list[float] = scores.gather(1, tokens[0, 1:, None])[:, 0].tolist()
    return found


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
