"""Which tokens are trained, by renderer and by `train_on_what`."""

from itertools import groupby
from typing import Any

import numpy as np
import pytest

from mint.errors import InvalidInputError
from mint.recipe import Message, TrainOnWhat
from mint.recipe.renderers import Renderer, get_renderer
from tests.unit.mint.recipe.conftest import MakeTokenizer, conversation
from tests.unit.mint.recipe.templates import LLAMA3, MARKED, QWEN3

TEMPLATES = {"llama3": LLAMA3, "qwen3": QWEN3}
TWO_TURNS = conversation("Q1", "A1", "Q2", "A2", system="S")


def make(name: str, make_tokenizer: MakeTokenizer) -> Renderer:
    """`template:x` is the template renderer over template x."""
    kind, _, variant = name.partition(":")
    templates = {"qwen3": QWEN3, "marked": MARKED, "llama3": LLAMA3}
    template = templates[variant] if variant else TEMPLATES.get(kind)
    return get_renderer(kind, make_tokenizer(template, bos_token="<|begin_of_text|>"))


def trained_texts(
    renderer: Renderer, messages: list[Message], what: TrainOnWhat | str | None = None
) -> list[str]:
    """The runs of tokens with weight 1, as texts."""
    chosen = () if what is None else (what,)
    model_input, weights = renderer.build_supervised_example(messages, *chosen)
    assert set(np.unique(weights)) <= {0.0, 1.0}
    tokenizer: Any = renderer.tokenizer
    pairs = zip(model_input.to_ints(), weights.tolist(), strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for weight, run in runs if weight]


EMPTY = "<think>\n\n</think>\n\n"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
# name -> an earlier answer, the last one, user messages
OUTPUTS = {
    "llama3": ("A1<|eot_id|>", "A2<|eot_id|>", "Q{}<|eot_id|>"),
    "qwen3": ("A1<|im_end|>", f"{EMPTY}A2<|im_end|>", "Q{}<|im_end|>"),
    "qwen3_disable_thinking": ("A1<|im_end|>", "A2<|im_end|>", "Q{}<|im_end|>"),
    "qwen3_5_disable_thinking": ("A1<|im_end|>", "A2<|im_end|>", "Q{}<|im_end|>"),
    "qwen3_8_disable_thinking": ("A1<|im_end|>", "A2<|im_end|>", "Q{}<|im_end|>"),
    "gemma3": ("A1<end_of_turn>", "A2<end_of_turn>", "Q{}<end_of_turn>"),
    "gemma4": ("A1<turn|>", "A2<turn|>", "Q{}<turn|>"),
    "gemma4_disable_thinking": ("A1<turn|>", "A2<turn|>", "Q{}<turn|>"),
    "glm4_5": ("\n<think></think>\nA1<|user|>", "\n<think></think>\nA2<|user|>", "Q{}"),
    "glm4_5_disable_thinking": ("\nA1<|user|>", "\nA2<|user|>", "Q{}/nothink"),
    "glm4_7_disable_thinking": ("A1<|user|>", "A2<|user|>", "Q{}"),
    "deepseekv3": (f"A1{EOS}", f"A2{EOS}", "Q{}"),
    "role_colon": (" A1\n\nUser:", " A2\n\nUser:", " Q{}\n\n"),
    "template:llama3": ("A1<|eot_id|>", "A2<|eot_id|>", "Q{}<|eot_id|>"),
    "template:qwen3": ("A1<|im_end|>", f"{EMPTY}A2<|im_end|>", "Q{}<|im_end|>"),
    "template:marked": ("A1<|im_end|>", "A2<|im_end|>", "Q{}<|im_end|>"),
}
SYSTEM = {"gemma3": "S\n\n", "glm4_5_disable_thinking": "S"}  # where it is not as a user's


def system(name: str) -> str:
    return SYSTEM.get(name) or OUTPUTS[name][2].replace("Q{}", "S")


each_renderer = pytest.mark.parametrize("name", OUTPUTS)


@each_renderer
def test_only_the_last_assistant_message_is_trained_by_default(
    name: str, make_tokenizer: MakeTokenizer
) -> None:
    """Requirements 21 and 24."""
    assert trained_texts(make(name, make_tokenizer), TWO_TURNS) == [OUTPUTS[name][1]]


@each_renderer
def test_all_assistant_messages_and_nothing_else(name: str, make_tokenizer: MakeTokenizer) -> None:
    """Requirement 25."""
    texts = trained_texts(make(name, make_tokenizer), TWO_TURNS, TrainOnWhat.ALL_ASSISTANT_MESSAGES)
    assert texts == list(OUTPUTS[name][:2])


@each_renderer
def test_all_messages_without_their_headers(name: str, make_tokenizer: MakeTokenizer) -> None:
    earlier, last, user = OUTPUTS[name]
    texts = trained_texts(make(name, make_tokenizer), TWO_TURNS, "all_messages")
    # In one piece, as an answer's end may be the next message's header.
    assert "".join(texts) == "".join([system(name), user.format(1), earlier, user.format(2), last])


@each_renderer
def test_all_tokens(name: str, make_tokenizer: MakeTokenizer) -> None:
    _, weights = make(name, make_tokenizer).build_supervised_example(TWO_TURNS, "all_tokens")
    assert weights.all()


@each_renderer
def test_user_and_system_messages(name: str, make_tokenizer: MakeTokenizer) -> None:
    user = OUTPUTS[name][2]
    texts = trained_texts(make(name, make_tokenizer), TWO_TURNS, "all_user_and_system_messages")
    # In one piece, as the first question may go on where the system message ends.
    assert "".join(texts) == system(name) + user.format(1) + user.format(2)


@each_renderer
def test_customized_messages(name: str, make_tokenizer: MakeTokenizer) -> None:
    chosen = [False, True, True, False, False]
    messages: list[Message] = [
        {**message, "trainable": trainable}
        for message, trainable in zip(TWO_TURNS, chosen, strict=True)
    ]
    earlier, _, user = OUTPUTS[name]
    assert trained_texts(make(name, make_tokenizer), messages, "customized") == [
        user.format(1),
        earlier,
    ]


@each_renderer
def test_what_comes_before_the_last_answer_is_its_prompt(
    name: str, make_tokenizer: MakeTokenizer
) -> None:
    renderer = make(name, make_tokenizer)
    model_input, weights = renderer.build_supervised_example(TWO_TURNS)
    prompt = renderer.build_generation_prompt(TWO_TURNS[:-1])

    assert model_input.to_ints()[: int(weights.argmax())] == prompt.to_ints()


def test_the_last_turn_is_all_after_the_last_question(make_tokenizer: MakeTokenizer) -> None:
    messages = [*TWO_TURNS, *conversation("", "A3")[1:]]
    renderer = make("llama3", make_tokenizer)
    texts = trained_texts(renderer, messages, TrainOnWhat.LAST_ASSISTANT_TURN)
    assert texts == ["A2<|eot_id|>", "A3<|eot_id|>"]


def test_the_last_assistant_message_need_not_be_the_last(make_tokenizer: MakeTokenizer) -> None:
    messages = conversation("Q1", "A1", "Q2")
    assert trained_texts(make("llama3", make_tokenizer), messages) == ["A1<|eot_id|>"]


def test_thinking_is_trained_with_the_answer(make_tokenizer: MakeTokenizer) -> None:
    answer = "<think>\nhm\n</think>\n\nA"
    for name in ("qwen3", "qwen3_disable_thinking", "template:qwen3"):
        renderer = make(name, make_tokenizer)
        assert trained_texts(renderer, conversation("Q", answer)) == [f"{answer}<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "answer", "trained"),
    [
        ("qwen3_5", "<think>\nhm\n</think>\n\nA", "hm\n</think>\n\nA<|im_end|>"),
        ("qwen3_5_preserve_thinking", "<think>\nhm\n</think>\n\nA", "hm\n</think>\n\nA<|im_end|>"),
        ("qwen3_8_low_reasoning", "<think>\nhm\n</think>\n\nA", "hm\n</think>\n\nA<|im_end|>"),
        ("gemma4", "<|channel>thought\nhm\n<channel|>A", None),
        ("glm4_5", "<think>hm</think>\nA", "\n<think>hm</think>\nA<|user|>"),
        ("glm4_7", "<think>hm</think>A", "hm</think>A<|user|>"),
        ("deepseek_r1", "<think>\nhm\n</think>\n\nA", f"hm\n</think>\n\nA{EOS}"),
        ("deepseekv3_thinking", "<think>hm</think>A", f"hm</think>A{EOS}"),
    ],
)
def test_thinking_is_trained_from_where_its_prompt_ends(
    name: str, answer: str, trained: str | None, make_tokenizer: MakeTokenizer
) -> None:
    renderer = make(name, make_tokenizer)
    messages = conversation("Q1", "A1", "Q2", answer)
    model_input, weights = renderer.build_supervised_example(messages)
    begins = int(weights.argmax())
    own = [t for t, w in zip(model_input.to_ints(), weights, strict=True) if w]

    assert trained_texts(renderer, messages) == [trained or f"{answer}<turn|>"]
    prompt = renderer.build_generation_prompt(messages[:-1])
    assert model_input.to_ints()[:begins] == prompt.to_ints()
    assert renderer.parse_response(own) == (messages[-1], True)


def test_an_answer_without_letters_is_still_ended(make_tokenizer: MakeTokenizer) -> None:
    for name in ("llama3", "template:llama3"):
        renderer = make(name, make_tokenizer)
        assert trained_texts(renderer, conversation("Q", "")) == ["<|eot_id|>"]
        assert trained_texts(renderer, conversation("Q", "  \n ")) == ["<|eot_id|>"]


@pytest.mark.parametrize(
    ("messages", "what", "problem"),
    [
        (conversation("Q"), "last_assistant_message", "has nothing to train on"),
        (
            conversation("Q", "A", "Q2"),
            "last_assistant_turn",
            "its roles are user, assistant, user",
        ),
        (conversation("", "A")[1:], "all_user_and_system_messages", "has nothing to train on"),
        (conversation("Q", "A"), "customized", r"`messages\[0\].trainable` is missing"),
        (conversation("Q", "A"), "everything", "must be one of last_assistant_message, "),
        (
            [{"role": "assistant", "content": "A", "trainable": 1}],
            "customized",
            "give true or false",
        ),
        (
            [{"role": "assistant", "content": "A", "trainable": True}],
            "last_assistant_message",
            "use 'customized'",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    make_tokenizer: MakeTokenizer, messages: list[Message], what: str, problem: str
) -> None:
    renderer = make("llama3", make_tokenizer)
    with pytest.raises(InvalidInputError, match=problem):
        renderer.build_supervised_example(messages, what)
