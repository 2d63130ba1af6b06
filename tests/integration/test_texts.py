"""Texts to tokens and back, by a server that has the tokenizer, for callers that have none."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from transformers import AutoTokenizer

import mint
from mint import recipe
from mint_core.text import process
from mintrpc.v1 import model_pb2, model_pb2_grpc, trainer_pb2_grpc, types_pb2
from tests.hosted import serving_texts
from tests.integration.conftest import KeyedTrainer
from tests.samplers import refusal
from tests.servers import RunningService
from tests.trainer_rpc import create, datum

LIMIT_S = 60.0
TEXTS = ["one two", "", " two  three\n", "😀 ünï", "<|im_end|>x", "a" * 3000]
CHATS: list[list[recipe.Message]] = [
    [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three 😀"},
        {"role": "assistant", "content": "four"},
    ],
]


@pytest.fixture(scope="module")
def stub(trainer: RunningService) -> Iterator[model_pb2_grpc.ModelServiceStub]:
    with grpc.insecure_channel(trainer.address) as channel:
        yield model_pb2_grpc.ModelServiceStub(channel)


@pytest.fixture(scope="module")
def tokenizer(qwen3_folder: Any) -> Any:
    return AutoTokenizer.from_pretrained(qwen3_folder)


def chat(messages: list[recipe.Message]) -> model_pb2.Chat:
    return model_pb2.Chat(messages=[dict(message) for message in messages])  # type: ignore[misc]


@pytest.mark.parametrize("special", [False, True])
def test_tokens_are_the_tokenizers(
    stub: model_pb2_grpc.ModelServiceStub, tokenizer: Any, special: bool
) -> None:
    request = model_pb2.TokenizeRequest(texts=TEXTS, add_special_tokens=special)
    made = stub.Tokenize(request, timeout=LIMIT_S).sequences
    expected = [tokenizer.encode(text, add_special_tokens=special) for text in TEXTS]
    assert [list(sequence.tokens) for sequence in made] == expected

    back = stub.Detokenize(model_pb2.DetokenizeRequest(sequences=made), timeout=LIMIT_S).texts
    assert list(back) == [tokenizer.decode(tokens) for tokens in expected]


@pytest.mark.parametrize("renderer", ["template", "role_colon", "qwen3", "qwen3_disable_thinking"])
@pytest.mark.parametrize("trained", list(recipe.TrainOnWhat))
@pytest.mark.filterwarnings("ignore::mint.recipe.renderers.RendererMismatchWarning")
def test_a_chat_is_rendered_as_the_client_renders_it(
    stub: model_pb2_grpc.ModelServiceStub,
    tokenizer: Any,
    renderer: str,
    trained: recipe.TrainOnWhat,
) -> None:
    ours = recipe.renderers.get_renderer(renderer, tokenizer)
    chats = CHATS
    if trained is recipe.TrainOnWhat.CUSTOMIZED:
        chats = [[{**m, "trainable": i % 2 == 0} for i, m in enumerate(c)] for c in CHATS]
    number = list(recipe.TrainOnWhat).index(trained) + 1
    made = stub.RenderChat(
        model_pb2.RenderChatRequest(
            chats=[chat(each) for each in chats],
            renderer=renderer,
            train_on_what=model_pb2.TrainOnWhat.Name(number),
        ),
        timeout=LIMIT_S,
    )
    for messages, rendered in zip(chats, made.chats, strict=True):
        tokens, weights = ours.build_supervised_example(messages, trained)
        assert list(rendered.tokens) == tokens.to_ints()
        assert list(rendered.weights) == weights.tolist()
    assert made.renderer == renderer
    assert [*made.stop, *made.stop_token_ids] == ours.get_stop_sequences()

    prompts = [messages[:-1] for messages in CHATS]
    asked = stub.RenderChat(
        model_pb2.RenderChatRequest(
            chats=[chat(each) for each in prompts], renderer=renderer, add_generation_prompt=True
        ),
        timeout=LIMIT_S,
    )
    for messages, rendered in zip(prompts, asked.chats, strict=True):
        assert list(rendered.tokens) == ours.build_generation_prompt(messages).to_ints()
        assert not rendered.weights


def test_the_client_leaves_the_tokenizer_on_the_server(
    trainer: RunningService, tokenizer: Any
) -> None:
    with mint.ServiceClient(base_url=trainer.address) as service:
        there = service.create_lora_training_client(rank=1).get_tokenizer(on_server=True)
        assert [there.encode(text) for text in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
        ours = recipe.renderers.get_renderer("template", tokenizer)
        theirs = recipe.renderers.get_renderer("template", there)
        for messages in CHATS:
            expected = recipe.conversation_to_datum(messages, ours, 2048)
            assert recipe.conversation_to_datum(messages, theirs, 2048) == expected


def test_tools_reach_the_chat_template(
    stub: model_pb2_grpc.ModelServiceStub, tokenizer: Any
) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    if "tools" not in str(tokenizer.chat_template):
        pytest.skip("the template knows no tools")
    made = stub.RenderChat(
        model_pb2.RenderChatRequest(
            chats=[chat(CHATS[0][:1])],
            renderer="template",
            add_generation_prompt=True,
            tools_json=json.dumps(tools),
        )
    )
    expected = tokenizer.apply_chat_template(
        CHATS[0][:1], tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert list(made.chats[0].tokens) == expected["input_ids"]


MESSAGE = {"role": "user", "content": "x"}
BAD: list[tuple[str, Any, str]] = [
    ("Tokenize", model_pb2.TokenizeRequest(base_model="other"), "base_model"),
    ("Tokenize", model_pb2.TokenizeRequest(texts=["a" * 4_194_300, "bbbb"]), "split it"),
    ("Tokenize", model_pb2.TokenizeRequest(texts=["a"] * 1025), "`texts` has more than 1024"),
    (
        "Detokenize",
        model_pb2.DetokenizeRequest(sequences=[{"tokens": [-1]}]),
        "sequences[0].tokens",
    ),
    (
        "Detokenize",
        model_pb2.DetokenizeRequest(sequences=[{}, {"tokens": [2**31 - 1]}]),
        "sequences[1].tokens",
    ),
    ("RenderChat", model_pb2.RenderChatRequest(renderer="none"), "`renderer` is 'none'"),
    ("RenderChat", model_pb2.RenderChatRequest(chats=[{}]), "`chats[0].messages` is empty"),
    (
        "RenderChat",
        model_pb2.RenderChatRequest(
            chats=[{"messages": [MESSAGE, {"role": "nobody", "content": ""}]}]
        ),
        "`chats[0].messages[1].role` is 'nobody'",
    ),
    (
        "RenderChat",
        model_pb2.RenderChatRequest(chats=[{"messages": [MESSAGE]}]),
        "nothing to train on",
    ),
    (
        "RenderChat",
        model_pb2.RenderChatRequest(train_on_what=2, add_generation_prompt=True),  # type: ignore[arg-type]
        "`train_on_what` is of no use",
    ),
    ("RenderChat", model_pb2.RenderChatRequest(tools_json="{"), "`tools_json` is not JSON"),
    ("RenderChat", model_pb2.RenderChatRequest(tools_json="{}"), "`tools_json` is no list"),
    (
        "RenderChat",
        model_pb2.RenderChatRequest(tools_json="[{}]", renderer="role_colon"),
        "`tools_json`",
    ),
]


@pytest.mark.parametrize(("method", "request_", "why"), BAD)
def test_a_bad_request_is_refused_by_field(
    stub: model_pb2_grpc.ModelServiceStub, method: str, request_: Any, why: str
) -> None:
    code, message, _ = refusal(lambda: getattr(stub, method)(request_, timeout=LIMIT_S))
    assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert why in message


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_chat_template_without_an_end_is_given_up_and_texts_go_on(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a hostile model's folder brings, or a text that takes as long."""
    monkeypatch.setattr(process, "LIMIT_S", 3.0)
    hostile = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    hostile.chat_template = ENDLESS
    hostile.save_pretrained(tmp_path)
    with serving_texts(tmp_path) as address, grpc.insecure_channel(address) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        request = model_pb2.RenderChatRequest(chats=[chat(CHATS[0])], renderer="template")
        code, message, _ = refusal(lambda: stub.RenderChat(request, timeout=LIMIT_S))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert "kept it for 3 s; send fewer or shorter ones" in message
        made = stub.Tokenize(model_pb2.TokenizeRequest(texts=["one"]), timeout=LIMIT_S)
        assert list(made.sequences[0].tokens) == tokenizer.encode("one")


def test_a_key_is_asked_for(keyed_trainer: KeyedTrainer) -> None:
    with grpc.insecure_channel(keyed_trainer.service.address) as channel:
        keyed = model_pb2_grpc.ModelServiceStub(channel)
        request = model_pb2.TokenizeRequest(texts=["one"])
        assert refusal(lambda: keyed.Tokenize(request))[0] == grpc.StatusCode.UNAUTHENTICATED
        made = keyed.Tokenize(request, timeout=LIMIT_S, **keyed_trainer.options("ann"))
        assert len(made.sequences) == 1


def test_training_on_text_is_training_on_its_tokens(
    trainer: RunningService, tokenizer: Any
) -> None:
    text = "one two three"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    with grpc.insecure_channel(trainer.address) as channel:
        stub = trainer_pb2_grpc.TrainerServiceStub(channel)
        by_tokens, by_text = create(stub), create(stub)
        data = datum([*tokens, 1])
        expected = by_tokens.send(by_tokens.forward_backward(data))

        data.model_input.CopyFrom(types_pb2.ModelInput(chunks=[{"text": {"text": text}}]))
        request = by_text.forward_backward(data)
        answer = by_text.send(request)
        assert answer == expected
        assert by_text.send(request) == answer  # the same call

        long = [{"text": {"text": "a" * 3_000_000}}] * 2
        data.model_input.CopyFrom(types_pb2.ModelInput(chunks=long))  # type: ignore[arg-type]
        request = by_text.forward_backward(data)
        for _ in range(2):  # it is its number's outcome
            said = by_text.refused(request)
            assert said.code == grpc.StatusCode.INVALID_ARGUMENT
            assert "split it" in said.message
        by_text.send(by_text.discard())
