"""What a constraint leaves to draw, by llguidance.

A continuation may go on with a token if the text can still be completed to a match, and end where
it matches. All ways to cut a text into tokens are allowed. Threads of their own compile and look
for the allowed tokens, outside the interpreter's lock, while the next pass is computed.
"""

import json
import re
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mint_core.errors import InvalidRequest, MintError
from sampler_service.engine.drawing.constraint_trial import ConstraintTrial, limits
from sampler_service.engine.drawing.key_patterns import key_patterns, matches_more
from sampler_service.engine.drawing.stop import Vocabulary
from sampler_service.jobs import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MASK_THREADS = 2
MAX_REASON = 300  # characters of a refusal that may quote the constraint
# Between JSON's own characters: enough to indent by, and not for ever.
WHITESPACE = r"[ \n\t\r]{1,32}"
CANNOT_TELL = (
    "that nothing matches two options of its `oneOf` cannot be seen; say `anyOf`, or have each "
    "require a property with a `const` of its own"
)


class ConstraintCompiler:
    """Compiles constraints for one vocabulary."""

    def __init__(self, vocabulary: Vocabulary, size: int) -> None:
        self._vocabulary = vocabulary
        self._size = size  # of the model's; the tokenizer may know fewer
        self._compiling: dict[str, ThreadPoolExecutor] = {}  # by tenant: who sends many waits alone
        self._trial = ConstraintTrial()
        self._trying = ThreadPoolExecutor(1, "try-constraints")  # in the order they come
        self._masking = ThreadPoolExecutor(MASK_THREADS, "mask-constraints")
        self._tokenizer: LLTokenizer | None = None

    def compile(self, constraint: Constraint, tenant: str = "") -> "Future[CompiledConstraint]":
        """Fails with InvalidRequest if nothing matches, or if it is not understood."""
        if tenant not in self._compiling:
            self._compiling[tenant] = ThreadPoolExecutor(1, "compile-constraints")
        return self._compiling[tenant].submit(self._compile, constraint)

    def _compile(self, constraint: Constraint) -> "CompiledConstraint":
        # Here, since nothing else needs it: images of GPU machines may lack it.
        from llguidance import LLTokenizer

        matcher = self._matcher(constraint)
        compiled = CompiledConstraint(constraint, self._size, matcher, self._masking)
        schema = json.loads(constraint.text) if constraint.kind == "json_schema" else None
        for pattern, keys in key_patterns(schema):
            text = json.dumps({"type": "string", "pattern": pattern})
            own = self._matcher(replace(constraint, text=text), LLTokenizer("byte"))
            if not matches_more(own, keys):
                raise compiled.refusal(
                    f"{json.dumps(pattern)} in `patternProperties` matches no key that "
                    "`properties` does not name; say under those names what it says of them, and "
                    "leave the pattern out"
                )
        compiled.first.set_result(matcher.compute_bitmask())
        if matcher.is_error():  # there is no first token, or looking for it takes too long
            raise compiled.refusal(_trouble(matcher))
        return compiled

    def _matcher(self, constraint: Constraint, tokens: "LLTokenizer | None" = None) -> "LLMatcher":
        """Of texts in the model's tokens, or in others."""
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_lark(_lark(constraint))
        own = self._trying.submit(self._try, grammar).result()
        if own is None:
            raise _refusal(constraint, "to compile it takes more than the server has for it")
        matcher = LLMatcher(tokens or own, grammar, log_level=0, limits=limits())
        if problem := _trouble(matcher) or "; ".join(matcher.get_grammar_warnings()):
            raise _refusal(constraint, problem)
        return matcher

    def _try(self, grammar: str) -> "LLTokenizer | None":
        """What the grammar may be compiled with, or None if it may not."""
        from llguidance import LLTokenizer, TokenizerWrapper

        if not self._trial.survives(grammar):
            return None
        if self._tokenizer is None:  # made with the first constraint: a second for 150,000 tokens
            tokens = TokenizerWrapper(_Tokens(self._vocabulary, self._size))
            self._tokenizer = LLTokenizer(tokens, n_vocab=self._size + 1, eos_token=self._size)
        return self._tokenizer


class _Tokens:
    """The vocabulary as llguidance reads it. Special tokens have no text. The end of a text is a
    token beyond the model's, since what ends a continuation differs from request to request.
    """

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, size: int) -> None:
        special = vocabulary.special_ids
        ids = range(size)
        self.eos_token_id = size
        self.special_token_ids = [*(i for i in ids if i in special), size]
        self.tokens = [b"" if i in special else vocabulary.bytes_of(i) for i in ids]
        self.tokens.append(b"<end of text>")

    def __call__(self, text: str) -> list[int]:
        raise AssertionError("asked for where one way to cut a text into tokens is forced")


@dataclass(frozen=True, slots=True, eq=False)
class CompiledConstraint:
    """From which each sample's own starts."""

    constraint: Constraint
    size: int  # of the model's vocabulary
    matcher: "LLMatcher"
    masking: ThreadPoolExecutor
    first: "Future[bytes]" = field(default_factory=Future)  # a bit for each token that may come

    def refusal(self, why: str) -> MintError:
        return _refusal(self.constraint, why)


class ConstrainedText:
    """One continuation and what may follow it."""

    def __init__(self, compiled: CompiledConstraint, ends: Collection[int]) -> None:
        """There is nothing in it yet; `ends` are the tokens that may end it."""
        self._compiled = compiled
        self._matcher = compiled.matcher.deep_copy()
        self._ends = np.array(sorted(ends), np.int64)
        self._mask = compiled.first

    def add(self, token: int) -> None:
        """Takes an allowed token that does not end the text."""
        self._mask = self._compiled.masking.submit(_advance, self._matcher, token)

    def allowed(self) -> NDArray[np.bool_]:  # [V], at least one
        """Which tokens may come next. Raises InvalidRequest if there are none, or if looking for
        them takes too long.
        """
        bits = np.frombuffer(self._mask.result(), np.uint8)
        size = self._compiled.size
        allowed = np.unpackbits(bits, count=size + 1, bitorder="little").view(np.bool_)
        allowed[self._ends] = allowed[size]
        if self._matcher.is_error() or not allowed[:size].any():
            raise self._compiled.refusal(_trouble(self._matcher))
        return allowed[:size]


def _advance(matcher: "LLMatcher", token: int) -> bytes:
    """Has a matcher take a token and look for those that may follow."""
    matcher.consume_token(token)
    return matcher.compute_bitmask()


def _refusal(constraint: Constraint, why: str) -> MintError:
    return InvalidRequest(
        f"`{constraint.field}` cannot be followed: {_readable(why)}; change it, or leave it out",
        field=constraint.field,
    )


def _trouble(matcher: "LLMatcher") -> str:
    """What is wrong; empty if nothing is."""
    error = matcher.get_error()
    if error.startswith("NoExtension"):
        return "no token of this model leads on to a match"
    return error


def _lark(constraint: Constraint) -> str:
    """The constraint in llguidance's own language, which alone can allow all cuts into tokens."""
    from llguidance import regex_to_lark

    if constraint.kind == "regex":
        rule = f"/{regex_to_lark(constraint.text, '')}/"
    else:
        schema = json.loads(constraint.text)
        if isinstance(schema, dict):
            schema = {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}
        rule = f"%json {json.dumps(schema)}"
    return f'%llguidance {{"no_forcing": true}}\nstart: {rule}'


def _readable(problem: str) -> str:
    """A problem without its place in llguidance's language, which the caller has not written."""
    if "coerce_one_of" in problem:
        return CANNOT_TELL
    words = re.split(r"\n\s*\d+ \| ", problem)[0]
    return " ".join(re.sub(r"^at \d+\(\d+\): ", "", words).split())[:MAX_REASON]
