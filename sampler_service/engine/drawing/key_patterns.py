"""Patterns of keys. Of one that matches nothing but keys that `properties` names too, the compiler
makes what leads nowhere half way through a text, so it is found before.
"""

import json
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from sampler_service.plain_schema import subschemas

if TYPE_CHECKING:
    from llguidance import LLMatcher


def key_patterns(schema: Any) -> Iterator[tuple[str, Collection[str]]]:
    """Each pattern in a schema that is followed, with the keys that are named beside it."""
    for found in subschemas(schema):
        patterns, named = found.get("patternProperties"), found.get("properties", {})
        if isinstance(patterns, dict) and isinstance(named, dict):
            for pattern in patterns:
                yield pattern, named


def matches_more(key: "LLMatcher", names: Collection[str]) -> bool:
    """Whether a matcher of JSON texts, by bytes, matches others than these names."""
    waiting = [(key, [json.dumps(name, ensure_ascii=False).encode() for name in names], 0)]
    while waiting:
        matcher, texts, at = waiting.pop()
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        for byte in allowed[allowed < 256].tolist():
            fitting = [text for text in texts if text[at : at + 1] == bytes([byte])]
            if not fitting:
                return True
            further = matcher.deep_copy()
            further.consume_token(byte)
            waiting.append((further, fitting, at + 1))
        if matcher.is_error():  # it has taken too long
            return True
    return False
