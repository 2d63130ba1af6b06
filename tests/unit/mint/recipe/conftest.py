"""A small BPE tokenizer with the marks of many families, and conversations to render."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mint.recipe import Message

MARKS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    *("<|user|>", "<|assistant|>"),  # GLM's
    *("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),  # gpt-oss's
]
# They come after the vocabulary has been learnt: more families change nothing for others.
LATER_MARKS = [
    *("<bos>", "<start_of_turn>", "<end_of_turn>"),  # Gemma 3's
    *("<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>"),  # Gemma 4's
    *("[gMASK]", "<sop>", "<|system|>"),  # GLM's
    *(f"<\uff5c{name}\uff5c>" for name in ("User", "Assistant")),  # DeepSeek's
    *(f"<\uff5c{side}\u2581of\u2581sentence\uff5c>" for side in ("begin", "end")),
]
# Line breaks and spaces get merged tokens of their own, as in real vocabularies.
_TEXTS = [
    "system\nuser\nassistant\n\nWhat is 2 + 3?\n\nIt is 5.\n\n\n  Let me",
    "think.\n\nUser: Assistant:\n\n",
    "the quick brown fox jumps over the lazy dog.\n\n",
]

# As in Qwen3's and Llama 3's tokenizers, line breaks go together, and with punctuation before.
_WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

MakeTokenizer = Callable[..., Any]


@pytest.fixture(scope="session")
def backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=MARKS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS * 3, trainer)
    # Qwen3's thinking marks are tokens, but not special ones.
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    tokenizer.add_special_tokens(LATER_MARKS)
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer(backend: Tokenizer) -> MakeTokenizer:
    """Opens the tokenizer with a chat template, or without."""

    def make(chat_template: str | None = None, **options: Any) -> Any:
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token="<|im_end|>",
            clean_up_tokenization_spaces=False,
            chat_template=chat_template,
            **options,
        )

    return make


def conversation(*contents: str, system: str | None = None) -> list[Message]:
    """Turns of user and assistant, the user first."""
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return opening + [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
