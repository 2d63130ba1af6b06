"""Tiny seeded models made in code, with a tokenizer: folders as a hub would give them."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from mint_core.hosting.service_config import ServiceConfig
from mint_core.model import loading

VOCABULARY_SIZE = 512
CONTEXT_LENGTH = 4096

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT_LENGTH,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_OF_EXPERTS = ("e_score_correction_bias", "per_expert_scale", "expert_bias")

# ChatML, as SmolLM2 and Qwen use it.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TEXTS = [
    "Question: What is 3 * 4?\nAnswer: 12",
    "the quick brown fox jumps over the lazy dog",
    "user assistant system",
    "one two three four five six seven eight nine ten",
]


def tiny_qwen3(
    folder: Path, *, tied: bool = True, seed: int = 0, layers: int = 2, inner: int = 128
) -> Path:
    """A Qwen3 of 2 layers and width 64."""
    sizes = {**SIZES, "num_hidden_layers": layers, "intermediate_size": inner}
    return _make(folder, Qwen3Config(**sizes, tie_word_embeddings=tied), seed)


def tiny_llama(folder: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """A Llama of 2 layers and width 64."""
    return _make(folder, LlamaConfig(**SIZES, tie_word_embeddings=tied), seed)


def tiny_qwen2(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen2 of 2 layers and width 64: biases on q, k and v."""
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    return _make(folder, Qwen2Config(**sizes, tie_word_embeddings=True), seed)


def tiny_mistral(folder: Path, *, sliding_window: int = 8, seed: int = 0) -> Path:
    """A Mistral of 2 layers and width 64 with a short sliding window."""
    return _make(folder, MistralConfig(**SIZES, sliding_window=sliding_window), seed)


def tiny_gemma2(folder: Path, *, sliding_window: int = 8, seed: int = 0) -> Path:
    """A Gemma 2 of 2 layers and width 64, the first with a short window: scores and logits are
    soft-capped, low enough for the caps to bend them.
    """
    config = Gemma2Config(
        **SIZES,
        sliding_window=sliding_window,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=2.0,
    )
    return _make(folder, config, seed)


def tiny_gemma3(folder: Path, *, sliding_window: int = 8, seed: int = 0) -> Path:
    """A text-only Gemma 3 of 2 layers and width 64: one windowed, one full, each with its own
    rotary frequencies.
    """
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **SIZES, sliding_window=sliding_window, query_pre_attn_scalar=16, layer_types=layers
    )
    return _make(folder, config, seed)


def tiny_phi3(folder: Path, *, seed: int = 0) -> Path:
    """A Phi-3 of 2 layers and width 64: q, k and v in one linear layer, gate and up in another, and
    rotary embeddings of a part of each head.
    """
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    return _make(folder, Phi3Config(**sizes, partial_rotary_factor=0.5), seed)


def _make(folder: Path, config: PretrainedConfig, seed: int) -> Path:
    torch.manual_seed(seed)
    return _save(folder, AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def make_model(folder: Path, model_class: type[Any], config: PretrainedConfig) -> Path:
    """A seeded model of a class. Weights that are usually left at 0 or 1, as those of norms, are
    near them; those of queries and keys are smaller, since sharp attention multiplies what float32
    rounds.
    """
    torch.manual_seed(0)
    model = model_class(config).float()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(_OF_EXPERTS):  # as after training: they change choices
                value.uniform_(0.95, 1.05)
            elif value.dim() < 2 and value.is_floating_point():
                value.add_(torch.randn(value.shape), alpha=0.1)
                value.mul_(0.5 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0)
    return _save(folder, model)


def own_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """As transformers loads it, of the class that its folder names."""
    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, named).from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )


def _save(folder: Path, model: Any) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(_OF_EXPERTS):
                continue
            if name.endswith("A_log"):  # states that fade slowly: what leaks would be seen
                parameter.uniform_(0.01, 0.3).log_()
            elif "conv" in name and parameter.dim() == 3:  # along tokens
                parameter.normal_(0.0, 0.5)
            elif parameter.dim() > 1:  # wider than the default, so that logits differ visibly
                parameter.normal_(0.0, 0.08)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.02)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": CONTEXT_LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def load_base(folder: Path | str, *, inference: bool = False, **options: Any) -> loading.LoadedBase:
    """As a service loads it that was told these options."""
    config = ServiceConfig(base_model=str(folder), **options)
    return loading.load_base(config, inference=inference)
