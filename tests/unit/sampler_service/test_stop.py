"""Continuations end where a search in the decoded text says."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sampler_service.engine.drawing.stop import StopWatch, Vocabulary
from sampler_service.jobs import StopReason, Stops
from tests.models import VOCABULARY_SIZE

LENGTH = 40


@pytest.fixture(scope="module")
def tokenizer(qwen3_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(qwen3_folder)


def end_of(watch: StopWatch, tokens: list[int]) -> tuple[int, StopReason] | None:
    """How many tokens were read when the continuation ended, and why."""
    for n, token in enumerate(tokens, start=1):
        if reason := watch.read(token):
            return n, reason
    return None


def brute_force(tokenizer: Any, tokens: list[int], texts: list[str]) -> int | None:
    """The first prefix whose text holds one of the texts."""
    for n in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:n], skip_special_tokens=False)
        if any(wanted in text for wanted in texts):
            return n
    return None


@given(st.data())
def test_texts_end_where_the_decoded_text_first_holds_them(tokenizer: Any, data: Any) -> None:
    ids = st.integers(0, VOCABULARY_SIZE - 1)
    tokens = data.draw(st.lists(ids, min_size=1, max_size=LENGTH))
    whole = tokenizer.decode(tokens, skip_special_tokens=False)
    # Parts of the text itself, so that most are found, and texts from anywhere.
    at = data.draw(st.integers(0, len(whole)))
    part = whole[at : at + data.draw(st.integers(1, 12))]
    anywhere = st.text("\u00e9abc \n\U0001f600", min_size=1, max_size=4)
    texts = data.draw(st.lists(anywhere, max_size=2))
    texts += [part] if part and "\ufffd" not in part else []
    watch = StopWatch(Stops(texts=tuple(texts)), LENGTH + 1, Vocabulary(tokenizer))
    expected = brute_force(tokenizer, tokens, texts)
    assert end_of(watch, tokens) == (None if expected is None else (expected, StopReason.STOP))


@pytest.mark.parametrize("text", ["\u00e9\U0001f600", "fox jumps", "<|im_end|>", "a\nb"])
def test_a_text_is_found_across_tokens_and_within_characters(tokenizer: Any, text: str) -> None:
    vocabulary = Vocabulary(tokenizer)
    tokens = tokenizer.encode(f"one {text} two", add_special_tokens=False)
    assert b"".join(map(vocabulary.bytes_of, tokens)) == f"one {text} two".encode()
    expected = brute_force(tokenizer, tokens, [text])
    assert expected is not None
    watch = StopWatch(Stops(texts=(text,)), LENGTH, vocabulary)
    assert end_of(watch, tokens) == (expected, StopReason.STOP)


def test_stop_tokens_end_and_others_do_not(tokenizer: Any) -> None:
    watch = StopWatch(Stops(token_ids=frozenset({7, 9})), LENGTH, Vocabulary(tokenizer))
    assert end_of(watch, [5, 6, 8, 9, 7]) == (4, StopReason.STOP)


def test_the_longest_continuation_ends_by_its_length(tokenizer: Any) -> None:
    watch = StopWatch(Stops(), 3, Vocabulary(tokenizer))
    assert end_of(watch, [5, 5, 5, 5]) == (3, StopReason.LENGTH)


def test_a_stop_at_the_last_token_is_a_stop(tokenizer: Any) -> None:
    watch = StopWatch(Stops(token_ids=frozenset({7})), 2, Vocabulary(tokenizer))
    assert end_of(watch, [5, 7]) == (2, StopReason.STOP)


def test_ids_beyond_the_tokenizer_add_nothing(tokenizer: Any) -> None:
    assert Vocabulary(tokenizer).bytes_of(len(tokenizer) + 5) == b""


def test_sentencepiece_pieces_and_bytes_are_spelled_out() -> None:
    pieces = ["<unk>", "a", "\u2581b", "<0xC3>", "<0xA9>", "\u2581"]
    backend = Tokenizer(models.BPE(dict(zip(pieces, range(6), strict=True)), [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert b"".join(map(vocabulary.bytes_of, [1, 2, 3, 4, 5, 1])) == "a b\u00e9 a".encode()
