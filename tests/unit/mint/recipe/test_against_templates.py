"""Token for token: what a renderer makes of a conversation, and what the model's template makes.

References are templates written from the models' documentation (`own`), the models' originals as
the package `trl` carries them, where it is installed, and renderings that were recorded from other
packages. tests/families/renderers.py says what was found where.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from mint.errors import InvalidInputError
from mint.recipe import Message
from mint.recipe.renderers import Renderer, get_renderer
from mint_chat.thinking import split_thinking
from tests.unit.mint.recipe.conftest import MakeTokenizer, conversation
from tests.unit.mint.recipe.templates import LLAMA3, QWEN3, packaged

OWN = {"llama3": LLAMA3, "qwen3": QWEN3, "qwen3_disable_thinking": QWEN3}
BOS = {
    "llama3": "<|begin_of_text|>",
    "gemma": "<bos>",
    "deepseek": "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
}
THINKING, NO_THINKING = {"enable_thinking": True}, {"enable_thinking": False}


class Reference(NamedTuple):
    renderer: str
    template: str  # `own`, or a file of `trl`
    options: Mapping[str, bool | str] = {}


REFERENCES = [
    Reference("llama3", "own"),
    Reference("qwen3", "own"),
    Reference("qwen3_disable_thinking", "own", NO_THINKING),
    Reference("llama3", "llama3"),
    Reference("qwen3", "qwen3"),
    Reference("qwen3_disable_thinking", "qwen3", NO_THINKING),
    Reference("qwen3_5", "qwen3_5_think"),
    Reference("qwen3_5", "qwen3_5_nothink", THINKING),
    Reference("qwen3_5", "qwen3_6"),
    Reference("qwen3_5_disable_thinking", "qwen3_5_think", NO_THINKING),
    Reference("qwen3_5_disable_thinking", "qwen3_5_nothink"),
    Reference("qwen3_5_preserve_thinking", "qwen3_6", {"preserve_thinking": True}),
    Reference("qwen3_8_xhigh_reasoning", "qwen3_8"),
    Reference("qwen3_8_medium_reasoning", "qwen3_8", {"reasoning_effort": "medium"}),
    Reference("qwen3_8_low_reasoning", "qwen3_8", {"reasoning_effort": "low"}),
    Reference("qwen3_8_disable_thinking", "qwen3_8", NO_THINKING),
    Reference("gemma3", "gemma3"),
    Reference("gemma3", "gemma"),
    Reference("gemma4", "gemma4_v5", THINKING),
    Reference("gemma4_disable_thinking", "gemma4_v5"),
    Reference("glm4_5", "glm4moe"),
    Reference("glm4_5_disable_thinking", "glm4moe", NO_THINKING),
    Reference("deepseek_r1", "deepseekv3"),  # R1's, by that name
    Reference("deepseek_r1", "deepseek_r1_distill"),
    Reference("deepseek_r1", "deepseek_r1_distill_training"),
]
# They refuse what is not by turns, where templates differ from each other or lose messages.
BY_TURNS = ("gemma", "deepseek")

RECORDED = json.loads((Path(__file__).parent / "renderings.json").read_text())

THOUGHT = "<think>\nTwo and three.\n</think>\n\nIt is 5."
CONVERSATIONS = {
    "one turn": conversation("What is 2 + 3?", "It is 5."),
    "system": conversation("What is 2 + 3?", "It is 5.", system="You are brief."),
    "turns": conversation("What is 2 + 3?", "It is 5.", "Twice?", "10", "Again?", "20"),
    "thinking last": conversation("Twice?", "10", "What is 2 + 3?", THOUGHT),
    "thinking earlier": conversation("What is 2 + 3?", THOUGHT, "Twice?", "10"),
    "thinking twice": conversation("What is 2 + 3?", THOUGHT, "Again?", THOUGHT, system="Think."),
    "empty block": conversation("a", "<think>\n\n</think>\n\nb"),
    "line breaks": conversation("\n\na\n", "\n\n b \n", "\nc", "\nd\n\n"),
    "empty contents": conversation("", "", "", ""),
    "other scripts": conversation("\u00e9\u00e8 \u4e2d\u6587 \U0001f600", "\U0001f680\u0bae"),
    "question last": conversation("What is 2 + 3?", "It is 5.", "Twice?"),
    "answers in a row": [*conversation("a", "b"), {"role": "assistant", "content": THOUGHT}],
    "no question": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}],
    "late system": [*conversation("a", "b"), {"role": "system", "content": "c"}],
}


def name_of(reference: Reference) -> str:
    return f"{reference.renderer}-{reference.template}"


@pytest.fixture(params=REFERENCES, ids=name_of)
def reference(request: pytest.FixtureRequest) -> Reference:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def tokenizer(reference: Reference, make_tokenizer: MakeTokenizer) -> Any:
    own = reference.template == "own"
    template = OWN[reference.renderer] if own else packaged(reference.template)
    if template is None:
        pytest.skip("the package `trl` is not installed")
    bos = [bos for family, bos in BOS.items() if reference.renderer.startswith(family)]
    return make_tokenizer(template, bos_token=bos[0] if bos else None)


def templated(
    tokenizer: Any, reference: Reference, messages: list[Message], *, prompts: bool
) -> list[int] | None:
    """The template's tokens; None if it refuses."""
    told = [_told(reference.renderer, message) for message in messages]
    try:
        tokens: list[int] = tokenizer.apply_chat_template(
            told,
            tokenize=True,
            return_dict=False,
            add_generation_prompt=prompts,
            **reference.options,
        )
    except TemplateError:
        return None
    ends = reference.renderer.startswith("glm") and messages[-1]["role"] == "assistant"
    # The next role's mark, at which sampling stops, is for a renderer to write.
    return [*tokens, *tokenizer.encode("<|user|>")] if ends and not prompts else list(tokens)


def _told(renderer: str, message: Message) -> dict[str, str]:
    """As the template takes a message: Gemma 4's and Qwen3.8's want thinking beside the content."""
    thinking, content = "", message["content"]
    if renderer.startswith("gemma4") and "\n<channel|>" in content:
        thinking, content = content.split("\n<channel|>")
        thinking = thinking.removeprefix("<|channel>thought\n")
    elif renderer.startswith("qwen3_8") and message["role"] == "assistant":
        thinking, content = split_thinking(content)
    beside = {"reasoning_content": thinking} if thinking else {}
    return {"role": message["role"], "content": content, **beside}


def said(renderer: str, messages: list[Message]) -> list[Message]:
    """With thinking between the marks of the renderer's model."""
    if not renderer.startswith("gemma4"):
        return messages
    thought = "<|channel>thought\nTwo and three.\n<channel|>It is 5."
    return [{**m, "content": m["content"].replace(THOUGHT, thought)} for m in messages]


def is_comparable(reference: Reference, messages: list[Message]) -> bool:
    """Gemma's first template refuses system messages. R1's leaves out the thinking of all answers,
    that for training of none.
    """
    if reference.template == "gemma":
        return messages[0]["role"] != "system"
    if reference.renderer != "deepseek_r1":
        return True
    answers = messages[:-1] if "training" in reference.template else messages[-1:]
    return not any("</think>" in m["content"] for m in answers if m["role"] == "assistant")


def is_by_turns(messages: list[Message]) -> bool:
    roles = [message["role"] for message in messages]
    turns = roles[roles[0] == "system" :]
    return bool(turns) and turns == (["user", "assistant"] * len(turns))[: len(turns)]


def check(renderer: Renderer, messages: list[Message], expected: list[int] | None) -> None:
    """Compares what is no prompt."""
    chosen: list[Message] = [{**message, "trainable": False} for message in messages]
    try:
        model_input, weights = renderer.build_supervised_example(chosen, "customized")
    except InvalidInputError:
        assert expected is None or may_refuse(renderer.name, messages)
    else:
        assert model_input.to_ints() == expected
        assert weights.shape == (model_input.length,)
        assert weights.dtype == np.float32


def check_prompt(renderer: Renderer, messages: list[Message], expected: list[int] | None) -> None:
    try:
        prompt = renderer.build_generation_prompt(messages)
    except InvalidInputError:
        assert expected is None or may_refuse(renderer.name, messages)
    else:
        assert prompt.to_ints() == expected


def may_refuse(name: str, messages: list[Message]) -> bool:
    if name == "deepseekv3" and THOUGHT in messages[-1]["content"]:
        return True  # it has no place for it
    if name.startswith("qwen3_8") and messages[0]["role"] == "system":
        return not messages[0]["content"].strip()  # which the template leaves out
    return name.startswith(BY_TURNS) and not is_by_turns(messages)


def test_a_matching_renderer_is_silent(tokenizer: Any, reference: Reference) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_renderer(reference.renderer, tokenizer)
    assert not caught


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_a_supervised_example_has_the_templates_tokens(
    tokenizer: Any, reference: Reference, case: str
) -> None:
    """Requirement 23."""
    messages = said(reference.renderer, CONVERSATIONS[case])
    if not is_comparable(reference, messages):
        pytest.skip("another reference has what this one leaves out")
    expected = templated(tokenizer, reference, messages, prompts=False)
    check(get_renderer(reference.renderer, tokenizer), messages, expected)


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_a_generation_prompt_has_the_templates_tokens(
    tokenizer: Any, reference: Reference, case: str
) -> None:
    messages = said(reference.renderer, CONVERSATIONS[case])
    if not is_comparable(reference, messages):
        pytest.skip("another reference has what this one leaves out")
    expected = templated(tokenizer, reference, messages, prompts=True)
    check_prompt(get_renderer(reference.renderer, tokenizer), messages, expected)


_PIECES = [*"ab .\n?", "<think>", "</think>", "\n\n", "<tool_response>", "\u4e2d"]
_CONTENT = st.lists(st.sampled_from(_PIECES), max_size=8).map("".join)
_MESSAGES = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), _CONTENT), min_size=1, max_size=6
)
_ROLES = ["system", *["user", "assistant"] * 3]
_BY_TURNS = st.tuples(st.booleans(), st.lists(_CONTENT, min_size=2, max_size=6)).map(
    lambda drawn: list(zip(_ROLES[not drawn[0] :], drawn[1], strict=False))
)


@pytest.mark.parametrize(
    "reference",
    [reference for reference in REFERENCES if reference.template != "own"],
    indirect=True,
    ids=name_of,
)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(turns=_MESSAGES | _BY_TURNS)
def test_any_conversation_has_the_original_templates_tokens(
    tokenizer: Any, reference: Reference, turns: list[tuple[str, str]]
) -> None:
    messages: list[Message] = [{"role": role, "content": content} for role, content in turns]
    assume(is_comparable(reference, messages))
    renderer = get_renderer(reference.renderer, tokenizer)

    check(renderer, messages, templated(tokenizer, reference, messages, prompts=False))
    check_prompt(renderer, messages, templated(tokenizer, reference, messages, prompts=True))


@pytest.mark.parametrize("entry", RECORDED, ids=lambda entry: entry["renderer"])
def test_a_conversation_has_the_recorded_tokens(
    entry: dict[str, Any], make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer()
    renderer = get_renderer(entry["renderer"], tokenizer)
    for rendering in entry["renderings"]:
        messages = rendering["messages"]
        if "prompt" in rendering:
            check_prompt(renderer, messages, tokenizer.encode(rendering["prompt"]))
            continue
        ends = renderer.name.startswith("glm") and messages[-1]["role"] == "assistant"
        text = rendering["whole"] + ("<|user|>" if ends else "")
        check(renderer, messages, tokenizer.encode(text))
