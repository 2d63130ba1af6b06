"""Choosing renderers, prompting, reading answers, refusing bad conversations."""

from typing import Any

import pytest

from mint import recipe
from mint.recipe.renderers import (
    RENDERER_NAMES,
    Renderer,
    RendererMismatchWarning,
    get_renderer,
)
from tests.unit.mint.recipe.conftest import MakeTokenizer, conversation
from tests.unit.mint.recipe.templates import LLAMA3, MARKED, QWEN3


@pytest.fixture(params=RENDERER_NAMES)
def renderer(request: pytest.FixtureRequest, make_tokenizer: MakeTokenizer) -> Renderer:
    qwen3 = dict.fromkeys(("template", "qwen3", "qwen3_disable_thinking"), QWEN3)
    template = {"llama3": LLAMA3, **qwen3}.get(request.param)
    return get_renderer(request.param, make_tokenizer(template, bos_token="<|begin_of_text|>"))


# What ends a thinking block that the prompt has opened, without a thought in it.
CLOSES = {
    "qwen3_5": "\n</think>\n\n",
    "qwen3_5_preserve_thinking": "\n</think>\n\n",
    **{f"qwen3_8_{effort}_reasoning": "\n</think>\n\n" for effort in ("xhigh", "medium", "low")},
    "glm4_7": "</think>",
    "deepseek_r1": "\n</think>\n\n",
    "deepseekv3_thinking": "</think>",
}


def sampled(renderer: Renderer, answer: str) -> list[int]:
    """Tokens of an answer, as a sampler would return them, its end included."""
    stop = renderer.get_stop_sequences()[0]
    tokenizer: Any = renderer.tokenizer
    text = answer + (stop if isinstance(stop, str) else tokenizer.decode([stop]))
    return list(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    ("model_name", "expected"),
    [
        ("Qwen/Qwen3-0.6B", "qwen3"),
        ("Qwen/Qwen3-30B-A3B", "qwen3"),
        ("Qwen/Qwen3-8B-FP8", "qwen3"),
        ("/models/Qwen3-0.6B/", "qwen3"),
        ("Qwen/Qwen3-8B-Base", "role_colon"),
        ("Qwen/Qwen3-4B-Instruct-2507", "template"),
        ("Qwen/Qwen3-Embedding-0.6B", "template"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "template"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama3"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
        ("meta-llama/Llama-3.1-8B", "role_colon"),
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "llama3"),
        ("unsloth/Qwen3-4B-Base-unsloth-bnb-4bit", "role_colon"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "template"),
        ("Qwen/Qwen3.5-4B", "qwen3_5"),
        ("Qwen/Qwen3.5-0.8B", "qwen3_5_disable_thinking"),
        ("Qwen/Qwen3.6-35B-A3B-FP8", "qwen3_5"),
        ("Qwen/Qwen3.5-4B-Base", "role_colon"),
        ("Qwen/Qwen3.8-27B", "qwen3_8_xhigh_reasoning"),
        ("google/gemma-3-270m-it", "gemma3"),
        ("google/gemma-3-4b-pt", "role_colon"),
        ("google/gemma-4-E2B-it", "gemma4_disable_thinking"),
        ("google/gemma-4-31B-it", "template"),
        ("google/gemma-2-2b-it", "template"),
        ("zai-org/GLM-4.5-Air", "glm4_5"),
        ("zai-org/GLM-4.6", "glm4_5"),
        ("zai-org/GLM-4.7-Flash", "glm4_7"),
        ("zai-org/GLM-4.5-Base", "role_colon"),
        ("zai-org/GLM-4.5V", "template"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "deepseek_r1"),
        ("deepseek-ai/DeepSeek-R1-0528", "template"),
        ("deepseek-ai/DeepSeek-V3.1", "template"),
        ("deepseek-ai/DeepSeek-V3.2", "deepseekv3"),
        # Trained by others on these families, into formats of their own.
        ("NousResearch/Hermes-3-Llama-3.1-8B", "template"),
        ("NousResearch/DeepHermes-3-Llama-3-8B-Preview", "template"),
        ("allenai/Llama-3.1-Tulu-3-8B", "template"),
        ("nvidia/Llama-3.1-Nemotron-Nano-8B-v1", "template"),
        ("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "template"),
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", "template"),
        ("somebody/some-model", "template"),
    ],
)
def test_a_renderer_is_recommended_by_name(model_name: str, expected: str) -> None:
    """Requirement 19."""
    assert recipe.get_recommended_renderer_name(model_name) == expected


def test_an_answer_reads_back_as_the_message_it_was(renderer: Renderer) -> None:
    answer = CLOSES.get(renderer.name, "") + "It is 5."
    message, ended = renderer.parse_response(sampled(renderer, answer))

    assert message == {"role": "assistant", "content": "It is 5."}
    assert ended


def test_what_is_trained_reads_back_as_the_message_it_was(renderer: Renderer) -> None:
    # R1's own template has no place for an answer without thinking.
    thought = "<think>\nhm\n</think>\n\n" if renderer.name == "deepseek_r1" else ""
    messages = conversation("What is 2 + 3?", thought + "It is 5.")
    model_input, weights = renderer.build_supervised_example(messages)
    trained = [t for t, w in zip(model_input.to_ints(), weights, strict=True) if w]
    if renderer.name == "template":  # it keeps the model's own thinking block
        messages[1]["content"] = "<think>\n\n</think>\n\nIt is 5."

    assert renderer.parse_response(trained) == (messages[1], True)


def test_an_answer_cut_short_says_so(renderer: Renderer) -> None:
    tokens = sampled(renderer, "It is 5.")[:2]
    message, ended = renderer.parse_response(tokens)

    assert not ended
    assert message["content"]
    assert "It is 5.".startswith(message["content"].removeprefix("<think>").strip())
    assert renderer.parse_response([]) == ({"role": "assistant", "content": ""}, False)


def test_what_follows_the_end_is_not_content(make_tokenizer: MakeTokenizer) -> None:
    renderer = get_renderer("qwen3", make_tokenizer(QWEN3))
    message, ended = renderer.parse_response([*sampled(renderer, "a"), *sampled(renderer, "b")])
    assert (message["content"], ended) == ("a", False)


def test_thinking_stays_in_the_content(make_tokenizer: MakeTokenizer) -> None:
    renderer = get_renderer("qwen3", make_tokenizer(QWEN3))
    answer = "<think>\nhm\n</think>\n\nIt is 5."
    assert renderer.parse_response(sampled(renderer, answer))[0]["content"] == answer


def test_role_colon_answers_end_at_the_next_user_or_at_eos(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    renderer = get_renderer("role_colon", tokenizer)

    assert renderer.get_stop_sequences() == ["\n\nUser:"]
    for text in (" 5\n\nUser: and", " 5<|im_end|>"):
        message, ended = renderer.parse_response(tokenizer.encode(text))
        assert (message["content"], ended) == ("5", True)


def test_stops_are_token_ids_where_the_format_has_marks(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(MARKED)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert get_renderer("template", tokenizer).get_stop_sequences() == [end]
    assert get_renderer("llama3", make_tokenizer()).get_stop_sequences() == [
        tokenizer.convert_tokens_to_ids("<|eot_id|>")
    ]


def test_a_prompt_goes_on_from_its_prefill(renderer: Renderer) -> None:
    messages = conversation("What is 2 + 3?")
    plain = renderer.build_generation_prompt(messages).to_ints()
    prefilled = renderer.build_generation_prompt(messages, prefill="It is").to_ints()

    assert prefilled[: len(plain)] == plain
    assert renderer.tokenizer.decode(prefilled[len(plain) :], skip_special_tokens=False) == "It is"


def test_a_prompt_for_another_role(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(QWEN3)
    messages = conversation("a", "b")
    for name in ("qwen3", "qwen3_disable_thinking"):
        prompt = get_renderer(name, tokenizer).build_generation_prompt(messages, role="user")
        assert tokenizer.decode(prompt.to_ints()).endswith("b<|im_end|>\n<|im_start|>user\n")
    with pytest.raises(ValueError, match="prompts for the assistant alone"):
        get_renderer("template", tokenizer).build_generation_prompt(messages, role="user")
    with pytest.raises(ValueError, match="`role` is 'robot'"):
        get_renderer("qwen3", tokenizer).build_generation_prompt(messages, role="robot")


def test_role_colon_begins_as_the_tokenizer_does(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    prompt = get_renderer("role_colon", tokenizer).build_generation_prompt(conversation("a"))
    assert tokenizer.decode(prompt.to_ints()) == "User: a\n\nAssistant:"


def test_where_a_renderer_and_the_template_part_is_said(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(MARKED)
    with pytest.warns(RendererMismatchWarning) as caught:
        renderer = get_renderer("qwen3", tokenizer)

    text = str(caught[0].message)
    sample_prompt = "<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 3?"
    shared = tokenizer.encode(
        sample_prompt + "<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n<|im_start|>user\n"
        "And twice that?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert f"part in a sample conversation at token {len(shared)}," in text
    assert "the renderer has '<think>" in text
    assert "and the template '10<|im_end|>" in text
    assert renderer.name == "qwen3"


def test_a_template_without_system_messages_is_compared_without(
    make_tokenizer: MakeTokenizer,
) -> None:
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    tokenizer = make_tokenizer(refusing + QWEN3)
    renderer = get_renderer("qwen3", tokenizer)  # silent: the rest agrees

    assert renderer.build_generation_prompt(conversation("a")).length > 0
    with pytest.raises(ValueError, match="chat template refuses `messages`: no system role"):
        get_renderer("template", tokenizer).build_generation_prompt(conversation("a", system="b"))


def test_a_tokenizer_without_the_marks_is_refused(make_tokenizer: MakeTokenizer) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    for name, mark in [("llama3", "start_header_id"), ("qwen3", "im_start")]:
        with pytest.raises(ValueError, match=f"renderer `{name}` needs the token `<.{mark}.>`"):
            get_renderer(name, bare)
    with pytest.raises(ValueError, match="has no chat template; use renderer `role_colon`"):
        get_renderer("template", bare)


def test_an_unknown_renderer_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(ValueError, match="`name` is 'qwen4'; there are the renderers template, "):
        get_renderer("qwen4", make_tokenizer())


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "`messages` is empty"),
        ("hello", "`messages` is a str"),
        (["hello"], r"`messages\[0\]` is a str; give a dict"),
        ([{"role": "user"}], r"`messages\[0\]` has no `content`"),
        ([{"content": "a"}], r"`messages\[0\]` has no `role`"),
        ([{"role": "robot", "content": "a"}], r"`messages\[0\].role` is 'robot'; .* knows system"),
        ([{"role": "user", "content": None}], r"`messages\[0\].content` is a NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content` is a list; give a string"),
        (
            [{"role": "assistant", "content": "", "tool_calls": []}],
            r"`messages\[0\]` has the key 'tool_calls', which no renderer reads",
        ),
    ],
)
def test_a_bad_conversation_is_refused(renderer: Renderer, messages: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        renderer.build_supervised_example(messages)
    with pytest.raises(ValueError, match=problem):
        renderer.build_generation_prompt(messages)


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3", "gemma4", "deepseek_r1", "deepseekv3"])
def test_a_system_message_that_is_not_the_first_is_refused(
    name: str, make_tokenizer: MakeTokenizer
) -> None:
    late: Any = [*conversation("a", "b"), {"role": "system", "content": "c"}]
    with pytest.raises(ValueError, match=r"`messages\[2\].role` is 'system', which this renderer"):
        get_renderer(name, make_tokenizer()).build_generation_prompt(late)


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "deepseek_r1", "deepseekv3"])
def test_what_is_not_by_turns_is_refused(name: str, make_tokenizer: MakeTokenizer) -> None:
    renderer = get_renderer(name, make_tokenizer())
    twice: Any = [*conversation("a", "b"), {"role": "assistant", "content": "c"}]
    with pytest.raises(ValueError, match=r"`messages\[2\].role` is 'assistant' where 'user'"):
        renderer.build_generation_prompt(twice)
    alone: Any = [{"role": "system", "content": "a"}]
    with pytest.raises(ValueError, match="`messages` has a system message alone"):
        renderer.build_generation_prompt(alone)


def test_a_conversation_without_a_question_is_refused(make_tokenizer: MakeTokenizer) -> None:
    renderer = get_renderer("qwen3_5", make_tokenizer())
    messages = conversation("<tool_response>a</tool_response>", "b")
    with pytest.raises(ValueError, match="`messages` has no question by a user"):
        renderer.build_supervised_example(messages)


def test_thinking_that_has_no_place_is_refused(make_tokenizer: MakeTokenizer) -> None:
    messages = conversation("a", "<think>hm</think>b")
    with pytest.raises(ValueError, match="has no place; use `deepseekv3_thinking`"):
        get_renderer("deepseekv3", make_tokenizer()).build_supervised_example(messages)


def test_an_empty_system_message_that_would_not_be_written_is_refused(
    make_tokenizer: MakeTokenizer,
) -> None:
    renderer = get_renderer("qwen3_8_disable_thinking", make_tokenizer())
    messages = conversation("a", "b", system=" ")
    with pytest.raises(ValueError, match=r"`messages\[0\].content` is empty; leave the system"):
        renderer.build_supervised_example(messages)
