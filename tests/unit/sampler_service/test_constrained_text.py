"""What may follow in a constrained text, against all matches written out."""

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mint_core.errors import InvalidRequest
from sampler_service.engine.drawing.constraint_compiler import (
    CompiledConstraint,
    ConstrainedText,
    ConstraintCompiler,
)
from sampler_service.engine.drawing.stop import Vocabulary
from sampler_service.jobs import Constraint
from tests.models import VOCABULARY_SIZE
from tests.unit.sampler_service.test_stop import byte_level, metaspace, sentencepiece

END = 2
SIZE = VOCABULARY_SIZE + 7  # of the model: the tokenizer knows fewer
TIMEOUT_S = 60.0
ALPHABET = ("a", "b", "é", "/", '"', "\n", " ")
LONGEST = 4  # characters of a match
LIKELY = [bytes([byte]) for byte in b'{}":,abc135']  # of a random text that is to end
REGEXES = (
    "ab|a{0,3}",
    "(a|b){2}é?",
    "[ab]é{1,2}/?",
    '"[^"b]{0,2}"',
    "^a(b|\n)/ ?$",
    "(?i:AB)\\s|a\\\\?/",
    "[^é]?é",
)


@pytest.fixture(scope="module")
def vocabulary(qwen3_folder: Path) -> Vocabulary:
    return Vocabulary(AutoTokenizer.from_pretrained(qwen3_folder))


@pytest.fixture(scope="module")
def compiler(vocabulary: Vocabulary) -> ConstraintCompiler:
    return ConstraintCompiler(vocabulary, SIZE)


def compiled(compiler: ConstraintCompiler, kind: str, text: object) -> CompiledConstraint:
    text = text if isinstance(text, str) else json.dumps(text)
    constraint = Constraint(kind, f"sampling_params.{kind}", text)
    return compiler.compile(constraint).result(TIMEOUT_S)


def matches_of(regex: str) -> set[bytes]:
    texts = ("".join(t) for n in range(LONGEST + 1) for t in product(ALPHABET, repeat=n))
    return {text.encode() for text in texts if re.fullmatch(regex, text)}


def slow_allowed(vocabulary: Vocabulary, matches: set[bytes], so_far: bytes) -> set[int]:
    """Tokens that leave the text the beginning of a match, in which nothing but ALPHABET may occur,
    and the end where it is one.
    """
    beginnings = {match[:n] for match in matches for n in range(len(match) + 1)}
    texts = {i: vocabulary.bytes_of(i) for i in range(SIZE) if i not in vocabulary.special_ids}
    ends = {END} if so_far in matches else set()
    return ends | {i for i, text in texts.items() if text and so_far + text in beginnings}


@pytest.mark.parametrize("regex", REGEXES)
def test_tokens_that_can_still_become_a_match_are_allowed_and_no_others(
    compiler: ConstraintCompiler, vocabulary: Vocabulary, regex: str
) -> None:
    matches = matches_of(regex)
    # What may stand in a match and is not of ALPHABET is left out on both sides.
    known = set("".join(ALPHABET).encode())
    legible = {i for i in range(SIZE) if set(vocabulary.bytes_of(i)) <= known} | {END}
    constraint = compiled(compiler, "regex", regex)
    rng = np.random.default_rng(0)
    for _ in range(12):
        text, so_far = ConstrainedText(constraint, [END]), b""
        for _ in range(2 * LONGEST + 1):
            allowed = set(np.flatnonzero(text.allowed()).tolist()) & legible
            assert allowed == slow_allowed(vocabulary, matches, so_far)
            token = int(rng.choice(sorted(allowed)))
            if token == END:
                break
            text.add(token)
            so_far += vocabulary.bytes_of(token)
        assert so_far in matches


def test_texts_of_one_constraint_do_not_share_where_they_are(
    compiler: ConstraintCompiler, vocabulary: Vocabulary
) -> None:
    constraint = compiled(compiler, "regex", "ab")
    a, b = (next(i for i in range(SIZE) if vocabulary.bytes_of(i) == text) for text in (b"a", b"b"))
    ahead, behind = ConstrainedText(constraint, [END]), ConstrainedText(constraint, [END])
    ahead.add(a)
    assert ahead.allowed()[b]
    assert not ahead.allowed()[a]
    assert behind.allowed()[a]
    assert not behind.allowed()[b]


def test_all_that_may_end_a_text_may_do_so_where_it_matches_and_nowhere_else(
    compiler: ConstraintCompiler, vocabulary: Vocabulary
) -> None:
    a = next(i for i in range(SIZE) if vocabulary.bytes_of(i) == b"a")
    ends = [END, a, SIZE - 1]
    text = ConstrainedText(compiled(compiler, "regex", "ba?"), ends)
    assert not text.allowed()[ends].any()
    text.add(next(i for i in range(SIZE) if vocabulary.bytes_of(i) == b"b"))
    assert text.allowed()[ends].all()


@pytest.mark.parametrize("make", [byte_level, sentencepiece, metaspace])
def test_tokens_of_every_kind_are_followed_as_they_decode(make: Callable[[], Tokenizer]) -> None:
    """Pieces beyond the byte alphabet, and added ones that are spaces."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make())
    size, a = len(tokenizer), tokenizer.convert_tokens_to_ids("a")
    compiler = ConstraintCompiler(Vocabulary(tokenizer), size + 1)
    middles = {i: tokenizer.decode([a, i, a]).removeprefix("a") for i in range(size)}
    legible = {i for i, text in middles.items() if "\ufffd" not in text}
    text = ConstrainedText(compiled(compiler, "regex", "[^ ]{8}"), [size])

    allowed = set(np.flatnonzero(text.allowed()).tolist()) & legible

    assert allowed == {i for i in legible if " " not in middles[i].removesuffix("a")}


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["x", "y"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


def test_random_walks_through_a_schema_end_in_what_it_describes(
    compiler: ConstraintCompiler, vocabulary: Vocabulary
) -> None:
    constraint = compiled(compiler, "json_schema", SCHEMA)
    rng = np.random.default_rng(0)
    for _ in range(20):
        text, so_far = ConstrainedText(constraint, [END]), b""
        while not (allowed := text.allowed())[END]:
            token = int(rng.choice(np.flatnonzero(allowed)))
            text.add(token)
            so_far += vocabulary.bytes_of(token)
        value = json.loads(so_far)
        assert list(value) == ["name", "age", "kind", "tags"]
        assert len(value["name"]) <= 5
        assert value["age"] in range(151)
        assert value["kind"] in ("x", "y")
        assert all(isinstance(tag, bool) for tag in value["tags"])


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        ("regex", "(", "unclosed group"),
        ("regex", "a(?=b)", "look-around"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", "[^\\x00-\\x{10ffff}]", "cannot be followed"),
        ("json_schema", False, "Unsatisfiable"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ("json_schema", {"type": "strin"}, "Invalid type"),
        ("json_schema", {"if": {}, "then": {}}, "Unimplemented keys"),
        ("json_schema", [], "must be an object"),
        ("json_schema", {"type": "string", "pattern": "("}, "unclosed group"),
        ("json_schema", {"maxLength": 3.5}, "Expected positive integer for 'maxLength'"),
        ("json_schema", {"oneOf": [{"type": "number"}, {"minimum": 3}]}, "say `anyOf`, or have"),
        (
            "json_schema",
            {"items": {"properties": {"a": {}, '"': {}}, "patternProperties": {'^["a]$': {}}}},
            r'"\^\[\\"a\]\$" in `patternProperties` matches no key that `properties` does not',
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(
    compiler: ConstraintCompiler, kind: str, text: object, why: str
) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        compiled(compiler, kind, text)
    assert caught.value.metadata["field"] == f"sampling_params.{kind}"
    assert "llguidance" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["^a", "^[abc]$", "b", "^.?$"])
def test_patterns_that_match_other_keys_too_are_followed_to_the_end(
    compiler: ConstraintCompiler, vocabulary: Vocabulary, pattern: str
) -> None:
    named = {"a": {"type": "integer", "maximum": 7}, "b": {"type": "integer", "minimum": 3}}
    schema = {"properties": named, "patternProperties": {pattern: {"type": "integer"}}}
    schema |= {"type": "object", "additionalProperties": False}
    constraint = compiled(compiler, "json_schema", schema)
    rng = np.random.default_rng(0)
    for _ in range(20):
        text, so_far = ConstrainedText(constraint, [END]), b""
        while not (allowed := text.allowed())[END]:
            likely = [t for t in np.flatnonzero(allowed) if vocabulary.bytes_of(t) in LIKELY]
            token = int(rng.choice(likely or np.flatnonzero(allowed)))
            text.add(token)
            so_far += vocabulary.bytes_of(token)
        value = json.loads(so_far)
        assert all(key in named or re.search(pattern, key) for key in value)
        assert value.get("a", 0) <= 7
        assert value.get("b", 3) >= 3


class Letters:
    """A vocabulary that cannot spell everything."""

    special_ids = frozenset({END})

    def bytes_of(self, token_id: int) -> bytes:
        return b"ab!"[token_id : token_id + 1]


def test_what_the_model_cannot_spell_is_refused_where_it_shows() -> None:
    compiler = ConstraintCompiler(Letters(), 3)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="no token of this model leads on"):
        compiled(compiler, "regex", "c")
    text = ConstrainedText(compiled(compiler, "regex", "ac"), [END])
    assert np.flatnonzero(text.allowed()).tolist() == [0]
    text.add(0)
    with pytest.raises(InvalidRequest, match="no token of this model leads on"):
        text.allowed()


CRASHING = {"type": "integer", "minimum": -(2**63), "maximum": -(2**63) + 1}
ENDLESS = {"type": "integer", "multipleOf": 9999991}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", CRASHING),
        ("json_schema", {"allOf": [{**CRASHING, "multipleOf": 7}]}),
        ("json_schema", {"items": {"type": "integer", "minimum": -2e19, "maximum": -1e19}}),
        ("json_schema", {"type": "integer", "minimum": -(2**63) + 1, "maximum": -(2**63) + 2}),
        ("json_schema", ENDLESS),
        ("regex", ".?" * 30_000),
    ],
)
def test_a_constraint_that_ends_or_keeps_the_library_is_refused_and_others_go_on(
    compiler: ConstraintCompiler, kind: str, text: object
) -> None:
    with pytest.raises(InvalidRequest, match="more than the server has") as caught:
        compiled(compiler, kind, text)
    assert caught.value.metadata["field"] == f"sampling_params.{kind}"
    assert compiled(compiler, "regex", "ab").first.done()


@pytest.mark.parametrize(
    "bounds",
    [(-(2**62), -(2**62)), (-9 * 10**18, 9 * 10**18), (2**63 - 1, 2**63 - 1), (-(2**53), 2**53)],
)
def test_integers_of_64_bits_are_followed(
    compiler: ConstraintCompiler, bounds: tuple[int, int]
) -> None:
    schema = {"type": "integer", "minimum": bounds[0], "maximum": bounds[1]}
    assert compiled(compiler, "json_schema", schema).first.done()


def test_who_sends_many_hard_constraints_waits_alone(compiler: ConstraintCompiler) -> None:
    slow = {"type": "integer", "multipleOf": 99991}  # half a second to try, and again to compile
    hard = Constraint("json_schema", "sampling_params.json_schema", json.dumps(slow))
    flood = [compiler.compile(hard, "a") for _ in range(2)]
    compiler.compile(Constraint("regex", "sampling_params.regex", "ab"), "b").result(TIMEOUT_S)
    assert not flood[-1].done()
    for each in flood:
        each.result(TIMEOUT_S)
