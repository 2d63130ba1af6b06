"""The renderer over the tokenizer's own chat template, SmolLM2's among them."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mint import recipe
from mint.recipe import TrainOnWhat
from mint.recipe.renderers import get_renderer
from tests.unit.mint.recipe.conftest import MakeTokenizer, conversation
from tests.unit.mint.recipe.templates import MARKED, QWEN3
from tests.unit.mint.recipe.test_weights import trained_texts

SMOLLM2 = Path(__file__).parents[4] / ".models/SmolLM2-135M-Instruct"
QUESTIONS = conversation("What is 2 + 3?", "It is 5.", "Twice?", "10")


@cache
def smollm2() -> Any:
    if not (SMOLLM2 / "tokenizer.json").exists():
        pytest.skip("`make model` has not been run")
    return recipe.get_tokenizer(str(SMOLLM2))


@pytest.mark.parametrize("system", [None, "You are brief."])
def test_smollm2_conversations_have_its_templates_tokens(system: str | None) -> None:
    """Requirements 18 and 23, on a real model's tokenizer and template."""
    messages = conversation("What is 2 + 3?", "It is 5.", "Twice?", "10", system=system)
    renderer = get_renderer(recipe.get_recommended_renderer_name(SMOLLM2.name), smollm2())
    model_input, _ = renderer.build_supervised_example(messages)
    prompt = renderer.build_generation_prompt(messages[:-1])

    templated = smollm2().apply_chat_template
    assert model_input.to_ints() == templated(messages, return_dict=False)
    assert prompt.to_ints() == templated(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )


def test_smollm2_answers_are_trained_to_their_end() -> None:
    renderer = get_renderer("template", smollm2())

    assert trained_texts(renderer, QUESTIONS) == ["10<|im_end|>"]
    assert trained_texts(renderer, QUESTIONS, TrainOnWhat.ALL_ASSISTANT_MESSAGES) == [
        "It is 5.<|im_end|>",
        "10<|im_end|>",
    ]
    assert trained_texts(renderer, QUESTIONS, TrainOnWhat.ALL_USER_AND_SYSTEM_MESSAGES) == [
        "What is 2 + 3?<|im_end|>",
        "Twice?<|im_end|>",
    ]
    assert renderer.get_stop_sequences() == [smollm2().eos_token_id]


def test_smollm2_agrees_with_no_other_format() -> None:
    with pytest.warns(recipe.renderers.RendererMismatchWarning, match="renderer `qwen3` and the"):
        get_renderer("qwen3", smollm2())


def test_generation_marks_decide_where_a_template_has_them(make_tokenizer: MakeTokenizer) -> None:
    """Here the marks leave the end mark out, which nothing else in the text would tell."""
    template = MARKED.replace(
        "m.content + '<|im_end|>' }}{% endgeneration %}",
        "m.content }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert template != MARKED
    renderer = get_renderer("template", make_tokenizer(template))
    assert trained_texts(renderer, QUESTIONS, "all_assistant_messages") == ["It is 5.", "10"]


def test_marks_of_adjacent_answers_fall_back_on_the_text(make_tokenizer: MakeTokenizer) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    messages = [*conversation("a", "b"), {"role": "assistant", "content": "c"}]
    renderer = get_renderer("template", make_tokenizer(template))
    assert trained_texts(renderer, messages, "last_assistant_message") == ["c<|im_end|>"]  # type: ignore[arg-type]


def test_tool_messages_go_where_the_template_puts_them(make_tokenizer: MakeTokenizer) -> None:
    messages: Any = [
        {"role": "user", "content": "a"},
        {"role": "tool", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    renderer = get_renderer("template", make_tokenizer(MARKED))
    assert trained_texts(renderer, messages, "all_messages") == [
        "a<|im_end|>",
        "b<|im_end|>",
        "c<|im_end|>",
    ]
    with pytest.raises(ValueError, match=r"`messages\[1\].role` is 'tool'"):
        get_renderer("qwen3", make_tokenizer(QWEN3)).build_supervised_example(messages)


def test_a_message_that_the_template_hides_is_refused(make_tokenizer: MakeTokenizer) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content | length }}\n{% endfor %}"
    renderer = get_renderer("template", make_tokenizer(template))
    with pytest.raises(ValueError, match=r"`messages\[1\]` cannot be found"):
        renderer.build_supervised_example(conversation("a", "b"))


def test_without_an_end_mark_an_answer_ends_at_eos_or_text(make_tokenizer: MakeTokenizer) -> None:
    plain = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    bare, ruled = make_tokenizer(plain), make_tokenizer(plain.replace("\n", "\n---\n"))

    assert get_renderer("template", bare).get_stop_sequences() == [bare.eos_token_id]
    renderer = get_renderer("template", ruled)
    assert renderer.get_stop_sequences() == ["\n---\n"]
    assert trained_texts(renderer, conversation("a", "b")) == [" b\n---\n"]
    assert renderer.parse_response(ruled.encode("b\n---\n"))[0]["content"] == "b"
