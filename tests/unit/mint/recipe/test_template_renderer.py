"""The renderer over the tokenizer's own chat template, SmolLM2's among them."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mint import recipe
from mint.recipe import TrainOnWhat
from mint.recipe.renderers import get_renderer
from tests.unit.mint.recipe.conftest import MakeTokenizer, conversation
from tests.unit.mint.recipe.templates import GLM, GPT_OSS, MARKED, PLAIN, QWEN3, packaged
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
    """But for the end of an answer, which is trained though these leave it out."""
    template = MARKED.replace(
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}",
        "{{ m.content[:-1] }}{% generation %}{{ m.content[-1] }}{% endgeneration %}<|im_end|>",
    )
    assert template != MARKED
    renderer = get_renderer("template", make_tokenizer(template))
    assert trained_texts(renderer, QUESTIONS, "all_assistant_messages") == [
        ".<|im_end|>",
        "0<|im_end|>",
    ]


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


def own_or_packaged(source: str, own: str, name: str) -> str:
    template = own if source == "own" else packaged(name)
    if template is None:
        pytest.skip("the package `trl` is not installed")
    return template


sources = pytest.mark.parametrize("source", ["own", "packaged"])


@sources
def test_the_next_roles_mark_is_the_end_where_nothing_else_ends_an_answer(
    source: str, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(own_or_packaged(source, GLM, "glm4moe"))
    renderer = get_renderer("template", tokenizer)
    earlier, last = trained_texts(renderer, QUESTIONS, "all_assistant_messages")
    model_input, _ = renderer.build_supervised_example(QUESTIONS)
    theirs = tokenizer.apply_chat_template(QUESTIONS, return_dict=False)

    assert earlier.endswith("It is 5.<|user|>")
    assert last.endswith("10<|user|>")
    assert tokenizer.convert_ids_to_tokens(renderer.get_stop_sequences()) == ["<|user|>"]
    assert model_input.to_ints() == [*theirs, *renderer.get_stop_sequences()]


@sources
def test_an_answer_that_ends_in_another_mark_than_the_last_is_refused(
    source: str, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(own_or_packaged(source, GPT_OSS, "gptoss"))
    renderer = get_renderer("template", tokenizer)

    assert tokenizer.convert_ids_to_tokens(renderer.get_stop_sequences()) == ["<|return|>"]
    assert trained_texts(renderer, QUESTIONS) == ["<|channel|>final<|message|>10<|return|>"]
    for what in ("all_assistant_messages", "all_messages", "all_tokens"):
        with pytest.raises(ValueError, match=r"`messages\[1\]` does not end in '<.return.>' here"):
            renderer.build_supervised_example(QUESTIONS, what)


def test_eos_at_the_last_answer_alone_ends_that_alone(make_tokenizer: MakeTokenizer) -> None:
    last = "{% if loop.last and m.role == 'assistant' %}<|im_end|>{% endif %}"
    template = PLAIN.replace("\n", "\n" + last)
    renderer = get_renderer("template", make_tokenizer(template))

    assert trained_texts(renderer, QUESTIONS) == [" 10\n<|im_end|>"]
    with pytest.raises(ValueError, match=r"`messages\[1\]` does not end in '\\n<.im_end.>' here"):
        renderer.build_supervised_example(QUESTIONS, "all_assistant_messages")


def test_a_template_that_ends_answers_with_nothing_trains_none(
    make_tokenizer: MakeTokenizer,
) -> None:
    bare = make_tokenizer(PLAIN)
    renderer = get_renderer("template", bare)

    assert renderer.get_stop_sequences() == [bare.eos_token_id]
    assert trained_texts(renderer, QUESTIONS, "all_user_and_system_messages")
    with pytest.raises(ValueError, match="renderer `template` cannot train answers of this"):
        renderer.build_supervised_example(QUESTIONS)


def test_without_a_mark_an_answer_ends_at_text(make_tokenizer: MakeTokenizer) -> None:
    ruled = make_tokenizer(PLAIN.replace("\n", "\n---\n"))
    renderer = get_renderer("template", ruled)

    assert renderer.get_stop_sequences() == ["\n---\n"]
    assert trained_texts(renderer, QUESTIONS, "all_assistant_messages") == [
        " It is 5.\n---\n",
        " 10\n---\n",
    ]
    assert renderer.parse_response(ruled.encode("b\n---\n"))[0]["content"] == "b"
