"""Token for token: what a renderer makes of a conversation, and what the model's template makes.

Each renderer is compared with a template written from the model's documentation (`own`) and, where
the package `trl` is installed, with the model's original, which it carries (`packaged`).
"""

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mint.recipe import Message
from mint.recipe.renderers import get_renderer
from tests.unit.mint.recipe.conftest import MakeTokenizer, conversation
from tests.unit.mint.recipe.templates import LLAMA3, QWEN3, packaged

OWN = {"llama3": LLAMA3, "qwen3": QWEN3, "qwen3_disable_thinking": QWEN3}
FILES = {"llama3": "llama3", "qwen3": "qwen3", "qwen3_disable_thinking": "qwen3"}
OPTIONS: dict[str, dict[str, bool]] = {
    "llama3": {},
    "qwen3": {},
    "qwen3_disable_thinking": {"enable_thinking": False},
}

THOUGHT = "<think>\nTwo and three.\n</think>\n\nIt is 5."
CONVERSATIONS = {
    "one turn": conversation("What is 2 + 3?", "It is 5."),
    "system": conversation("What is 2 + 3?", "It is 5.", system="You are brief."),
    "turns": conversation("What is 2 + 3?", "It is 5.", "Twice?", "10", "Again?", "20"),
    "thinking last": conversation("Twice?", "10", "What is 2 + 3?", THOUGHT),
    "thinking earlier": conversation("What is 2 + 3?", THOUGHT, "Twice?", "10"),
    "empty block": conversation("a", "<think>\n\n</think>\n\nb"),
    "line breaks": conversation("\n\na\n", "\n\n b \n", "\nc", "\nd\n\n"),
    "empty contents": conversation("", "", "", ""),
    "other scripts": conversation("\u00e9\u00e8 \u4e2d\u6587 \U0001f600", "\U0001f680\u0bae"),
    "question last": conversation("What is 2 + 3?", "It is 5.", "Twice?"),
    "answers in a row": [*conversation("a", "b"), {"role": "assistant", "content": THOUGHT}],
    "no question": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}],
    "late system": [*conversation("a", "b"), {"role": "system", "content": "c"}],
}


@pytest.fixture(params=["own", "packaged"])
def source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(OWN))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(name: str, source: str, make_tokenizer: MakeTokenizer) -> Any:
    template = OWN[name] if source == "own" else packaged(FILES[name])
    if template is None:
        pytest.skip("the package `trl` is not installed")
    return make_tokenizer(template, bos_token="<|begin_of_text|>" if name == "llama3" else None)


def templated(tokenizer: Any, messages: list[Message], **options: bool) -> list[int]:
    tokens = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    return list(tokens)


def test_a_matching_renderer_is_silent(tokenizer: Any, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_renderer(name, tokenizer)


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_a_supervised_example_has_the_templates_tokens(
    tokenizer: Any, name: str, case: str
) -> None:
    """Requirement 23."""
    messages = CONVERSATIONS[case]
    model_input, weights = get_renderer(name, tokenizer).build_supervised_example(
        messages, train_on_what="all_messages"
    )

    assert model_input.to_ints() == templated(tokenizer, messages, **OPTIONS[name])
    assert weights.shape == (model_input.length,)
    assert weights.dtype == np.float32


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_a_generation_prompt_has_the_templates_tokens(tokenizer: Any, name: str, case: str) -> None:
    messages = CONVERSATIONS[case]
    prompt = get_renderer(name, tokenizer).build_generation_prompt(messages)

    expected = templated(tokenizer, messages, add_generation_prompt=True, **OPTIONS[name])
    assert prompt.to_ints() == expected


_PIECES = [*"ab .\n?", "<think>", "</think>", "\n\n", "<tool_response>", "\u4e2d"]
_CONTENT = st.lists(st.sampled_from(_PIECES), max_size=8).map("".join)
_MESSAGES = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), _CONTENT), min_size=1, max_size=6
)


@pytest.mark.parametrize("source", ["packaged"], indirect=True)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(turns=_MESSAGES)
def test_any_conversation_has_the_original_templates_tokens(
    tokenizer: Any, name: str, turns: list[tuple[str, str]]
) -> None:
    messages: list[Message] = [{"role": role, "content": content} for role, content in turns]
    renderer = get_renderer(name, tokenizer)
    model_input, _ = renderer.build_supervised_example(messages, "all_tokens")
    prompt = renderer.build_generation_prompt(messages)

    assert model_input.to_ints() == templated(tokenizer, messages, **OPTIONS[name])
    assert prompt.to_ints() == templated(
        tokenizer, messages, add_generation_prompt=True, **OPTIONS[name]
    )
