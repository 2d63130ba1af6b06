"""Continuations end where a search in the decoded text says."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sampler_service.engine.drawing.stop import StopTexts, StopWatch, Vocabulary
from sampler_service.jobs import StopReason, Stops
from tests.models import VOCABULARY_SIZE

LENGTH = 40


@pytest.fixture(scope="module")
def tokenizer(qwen3_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(qwen3_folder)


def stop_watch(tokenizer: Any, texts: list[str]) -> StopWatch:
    automaton = StopTexts(texts, Vocabulary(tokenizer))
    return StopWatch(Stops(texts=tuple(texts)), LENGTH + 1, automaton)


def no_texts(tokenizer: Any) -> StopTexts:
    return StopTexts((), Vocabulary(tokenizer))


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
    watch = stop_watch(tokenizer, texts)
    expected = brute_force(tokenizer, tokens, texts)
    assert end_of(watch, tokens) == (None if expected is None else (expected, StopReason.STOP))


@pytest.mark.parametrize("text", ["\u00e9\U0001f600", "fox jumps", "<|im_end|>", "a\nb"])
def test_a_text_is_found_across_tokens_and_within_characters(tokenizer: Any, text: str) -> None:
    vocabulary = Vocabulary(tokenizer)
    tokens = tokenizer.encode(f"one {text} two", add_special_tokens=False)
    assert b"".join(map(vocabulary.bytes_of, tokens)) == f"one {text} two".encode()
    expected = brute_force(tokenizer, tokens, [text])
    assert expected is not None
    watch = stop_watch(tokenizer, [text])
    assert end_of(watch, tokens) == (expected, StopReason.STOP)


def test_stop_tokens_end_and_others_do_not(tokenizer: Any) -> None:
    watch = StopWatch(Stops(token_ids=frozenset({7, 9})), LENGTH, no_texts(tokenizer))
    assert end_of(watch, [5, 6, 8, 9, 7]) == (4, StopReason.STOP)


def test_the_longest_continuation_ends_by_its_length(tokenizer: Any) -> None:
    watch = StopWatch(Stops(), 3, no_texts(tokenizer))
    assert end_of(watch, [5, 5, 5, 5]) == (3, StopReason.LENGTH)


def test_a_stop_at_the_last_token_is_a_stop(tokenizer: Any) -> None:
    watch = StopWatch(Stops(token_ids=frozenset({7})), 2, no_texts(tokenizer))
    assert end_of(watch, [5, 7]) == (2, StopReason.STOP)


def test_ids_beyond_the_tokenizer_add_nothing(tokenizer: Any) -> None:
    assert Vocabulary(tokenizer).bytes_of(len(tokenizer) + 5) == b""


def byte_level() -> Tokenizer:
    # With pieces beyond the byte alphabet, which decode as they are.
    pieces = ["a", "\u0120", "\u0120b", "\u00c3", "\u00a9", "\u4e2d", "\u0120\u4e2d", "\ufffd"]
    backend = Tokenizer(models.BPE(numbered(pieces), []))
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(["\u0120\u0120", AddedToken("\u00e9", normalized=False), "x y"])
    return backend


def sentencepiece() -> Tokenizer:
    pieces = ["<unk>", "a", "\u2581b", "<0xC3>", "<0xA9>", "\u2581", "\u4e2d", "\ufffd"]
    backend = Tokenizer(models.BPE(numbered(pieces), [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_tokens(["\u2581\u2581", "\n\n", "<0x41>"])
    return backend


def metaspace() -> Tokenizer:
    backend = Tokenizer(models.Unigram([("a", -1.0), ("\u2581b", -1.0), ("\u2581", -2.0)], 0))
    backend.decoder = decoders.Metaspace()
    backend.add_tokens(["\u2581\u2581\u2581", "\u2581\u00e9"])
    return backend


def wordpiece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(numbered(["[UNK]", "a", "##b", "b", ".", "\u4e2d"])))
    backend.decoder = decoders.WordPiece()
    backend.add_tokens(["##new"])
    return backend


def ends_of_words() -> Tokenizer:
    backend = Tokenizer(
        models.BPE(numbered(["a", "b", "b</w>", "a</w>"]), [], end_of_word_suffix="</w>")
    )
    backend.decoder = decoders.BPEDecoder()
    return backend


def without_decoder() -> Tokenizer:
    return Tokenizer(models.WordLevel(numbered(["a", "b", "\u4e2d"]), unk_token="a"))


def numbered(pieces: list[str]) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(pieces)}


@pytest.mark.parametrize(
    "make",
    [byte_level, sentencepiece, metaspace, wordpiece, ends_of_words, without_decoder],
)
@given(data=st.data())
def test_tokens_of_every_kind_add_what_decoding_adds(
    make: Callable[[], Tokenizer], data: Any
) -> None:
    backend = make()
    backend.add_special_tokens(["<s>", "<\u2581s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    vocabulary = Vocabulary(tokenizer)
    assert {backend.id_to_token(i) for i in vocabulary.special_ids} == {"<s>", "<\u2581s>"}
    a = backend.token_to_id("a")
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=LENGTH))
    spelled = b"".join(map(vocabulary.bytes_of, tokens))
    assume(is_text(spelled))
    alone = tokenizer.decode([a])
    behind = tokenizer.decode([a, a]).removeprefix(alone)
    assert tokenizer.decode([a, *tokens, a]) == alone + spelled.decode() + behind


def is_text(spelled: bytes) -> bool:
    try:
        spelled.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_stop_of_spaces_is_found_in_added_tokens_of_spaces() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=sentencepiece())
    a, spaces = map(tokenizer.convert_tokens_to_ids, ("a", "\u2581\u2581"))
    assert end_of(stop_watch(tokenizer, ["  "]), [a, spaces]) == (2, StopReason.STOP)


@given(
    texts=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=30),
    pieces=st.lists(st.text("abc", max_size=4), max_size=30),
)
def test_many_texts_end_where_each_of_them_looked_for_alone_would(
    texts: list[str], pieces: list[str]
) -> None:
    watch = StopWatch(Stops(texts=tuple(texts)), LENGTH, StopTexts(texts, Pieces(pieces)))  # type: ignore[arg-type]
    read = ["".join(pieces[:n]) for n in range(len(pieces) + 1)]
    expected = next((n for n, text in enumerate(read) if any(t in text for t in texts)), None)
    found = end_of(watch, list(range(len(pieces))))
    assert found == (None if expected is None else (expected, StopReason.STOP))


def test_a_byte_costs_the_same_however_many_texts_there_are() -> None:
    """In steps, of which each takes back what an earlier byte has added."""

    class Counted(dict[int, int]):
        looks = 0

        def get(self, key: int, default: Any = None) -> Any:
            self.looks += 1
            return super().get(key, default)

    random = Random(0)
    texts = ["".join(random.choices("ab", k=random.randint(8, 40))) + "!" for _ in range(1000)]
    read = "".join(random.choices("ab", k=5000))
    for many in (texts[:1], texts):
        automaton = StopTexts(many, Pieces([read]))  # type: ignore[arg-type]
        automaton._edges = counted = Counted(automaton._edges)
        automaton.read(0, 0)
        assert len(read) <= counted.looks <= 2 * len(read)


class Pieces:
    """A vocabulary of texts by their numbers."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def bytes_of(self, token_id: int) -> bytes:
        return self._pieces[token_id].encode()
