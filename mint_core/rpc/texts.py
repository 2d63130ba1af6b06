"""The RPCs of ModelService that turn texts into tokens and back: their requests, checked."""

import json
from array import array
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from mint_chat import TrainOnWhat
from mint_chat.messages import Message as Turn
from mint_chat.names import get_recommended_renderer_name
from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import InvalidRequest
from mint_core.rpc import limits
from mint_core.text.jobs import Detokenize, Render, Rendering, Tokenize
from mintrpc.v1 import model_pb2

# By the enum's numbers; unspecified is the default of the client too.
_TRAINED = [TrainOnWhat.LAST_ASSISTANT_MESSAGE, *TrainOnWhat]


def parse_tokenize(request: model_pb2.TokenizeRequest) -> Tokenize:
    _check_size(request)
    return Tokenize(tuple(request.texts), request.add_special_tokens)


def parse_detokenize(request: model_pb2.DetokenizeRequest, model: ModelDescription) -> Detokenize:
    sequences = [tuple(sequence.tokens) for sequence in request.sequences]
    most = limits.MAX_TOKENS_PER_CHUNK
    if sum(map(len, sequences)) > most:
        raise InvalidRequest(
            f"`sequences` have more than {most} tokens in all; split the request",
            field="sequences",
        )
    for index, tokens in enumerate(sequences):
        if tokens and not 0 <= min(tokens) <= max(tokens) < model.vocabulary_size:
            field = f"sequences[{index}].tokens"
            raise InvalidRequest(
                f"`{field}` has a token below 0 or beyond the vocabulary of "
                f"{model.vocabulary_size}; send tokens of the served model",
                field=field,
            )
    return Detokenize(sequences, request.skip_special_tokens)


def parse_render(request: model_pb2.RenderChatRequest, model: ModelDescription) -> Render:
    _check_size(request)
    if request.add_generation_prompt and request.train_on_what:
        raise InvalidRequest(
            "`train_on_what` is of no use with `add_generation_prompt`; leave one of them out",
            field="train_on_what",
        )
    if request.train_on_what >= len(_TRAINED):
        raise InvalidRequest(
            f"`train_on_what` is {request.train_on_what}, which this server does not know",
            field="train_on_what",
        )
    return Render(
        chats=[[_turn(message) for message in chat.messages] for chat in request.chats],
        renderer=request.renderer or get_recommended_renderer_name(model.name),
        train_on_what=_TRAINED[request.train_on_what].value,
        for_generation=request.add_generation_prompt,
        tools=_tools(request.tools_json),
    )


def tokenize_response(job: Tokenize, made: Sequence["array[int]"]) -> model_pb2.TokenizeResponse:
    return model_pb2.TokenizeResponse(sequences=[{"tokens": tokens} for tokens in made])


def detokenize_response(job: Detokenize, made: Sequence[str]) -> model_pb2.DetokenizeResponse:
    return model_pb2.DetokenizeResponse(texts=made)


def render_response(job: Render, made: Rendering) -> model_pb2.RenderChatResponse:
    response = model_pb2.RenderChatResponse(renderer=job.renderer)
    for tokens, weights in made.chats:
        response.chats.add(tokens=tokens, weights=weights)
    for stop in made.stops:
        if isinstance(stop, str):
            response.stop.append(stop)
        else:
            response.stop_token_ids.append(stop)
    return response


def _turn(message: model_pb2.ChatMessage) -> Turn:
    turn: Turn = {"role": message.role, "content": message.content}
    if message.HasField("trainable"):
        turn["trainable"] = message.trainable
    return turn


def _tools(text: str) -> list[dict[str, Any]]:
    if not text:
        return []
    try:
        tools = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"`tools_json` is not JSON: {error}", field="tools_json") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidRequest(
            "`tools_json` is no list of objects; describe each tool by one", field="tools_json"
        )
    return tools


def _check_size(request: Message) -> None:
    if request.ByteSize() > limits.MAX_TEXT_REQUEST_BYTES:
        raise InvalidRequest(
            f"the request has {request.ByteSize()} bytes, and at most "
            f"{limits.MAX_TEXT_REQUEST_BYTES} are taken; split it"
        )
