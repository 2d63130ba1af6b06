"""ModelService, which both services answer: what is served, and its tokenizer's files."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import Message

from mint_core import __version__
from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import BaseModelNotFound, ModelLoading
from mint_core.rpc import limits, texts
from mint_core.rpc.caller import caller, parsed
from mint_core.text.process import TextProcess
from mintrpc.v1 import model_pb2, model_pb2_grpc

R = TypeVar("R", bound=Message)
SERVICE = "mintrpc.v1.ModelService"
PIECE_BYTES = 1024 * 1024

# What opening a tokenizer reads, and nothing else of a model's folder.
_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    name: str
    content: bytes
    sha256: str


_LIMITS = model_pb2.Limits(
    **{name: getattr(limits, name.upper()) for name in model_pb2.Limits.DESCRIPTOR.fields_by_name}
)


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Answers from what the engine said of itself when it was last up."""

    def __init__(
        self,
        describe: Callable[[], ModelDescription | None],  # None: the engine has never been up
        engine_ready: Callable[[], bool],
        offer: model_pb2.GetServerCapabilitiesResponse,  # what only this service says of itself
        now: Callable[[], model_pb2.GetServerCapabilitiesResponse] | None = None,  # that changes
    ) -> None:
        self._describe = describe
        self.texts = TextProcess(describe, limits.MAX_TEXT_REQUEST_BYTES)
        self._engine_ready = engine_ready
        self._offer = offer
        self._now = now
        self._files: dict[str, tuple[TokenizerFile, ...]] = {}

    async def GetServerCapabilities(
        self, request: model_pb2.GetServerCapabilitiesRequest, context: Any
    ) -> model_pb2.GetServerCapabilitiesResponse:
        """See model.proto."""
        model = self._describe()
        capabilities = model_pb2.GetServerCapabilitiesResponse(
            server_version=__version__,
            base_models=[_base_model(model, await self._files_of(model))] if model else [],
            limits=_LIMITS,
            bitwise_reproducible=model is not None and model.bitwise_reproducible,
            bits_traded_for_speed=model is not None and model.bits_traded_for_speed,
            engine_ready=self._engine_ready(),
        )
        capabilities.MergeFrom(self._offer)
        if self._now is not None:
            capabilities.MergeFrom(self._now())
        return capabilities

    async def GetTokenizer(
        self, request: model_pb2.GetTokenizerRequest, context: Any
    ) -> AsyncIterator[model_pb2.GetTokenizerResponse]:
        """See model.proto."""
        model = self._model(request.base_model)
        for file in await self._files_of(model):
            for offset in range(0, max(len(file.content), 1), PIECE_BYTES):
                yield model_pb2.GetTokenizerResponse(
                    name=file.name,
                    size_bytes=len(file.content),
                    sha256=file.sha256,
                    offset_bytes=offset,
                    data=file.content[offset : offset + PIECE_BYTES],
                )

    async def Tokenize(
        self, request: model_pb2.TokenizeRequest, context: Any
    ) -> model_pb2.TokenizeResponse:
        """See model.proto."""
        self._model(request.base_model)
        return await self._answer(request, texts.parse_tokenize, texts.tokenize_response)

    async def Detokenize(
        self, request: model_pb2.DetokenizeRequest, context: Any
    ) -> model_pb2.DetokenizeResponse:
        """See model.proto."""
        parse = partial(texts.parse_detokenize, model=self._model(request.base_model))
        return await self._answer(request, parse, texts.detokenize_response)

    async def RenderChat(
        self, request: model_pb2.RenderChatRequest, context: Any
    ) -> model_pb2.RenderChatResponse:
        """See model.proto."""
        parse = partial(texts.parse_render, model=self._model(request.base_model))
        return await self._answer(request, parse, texts.render_response)

    async def _answer(
        self, request: Message, parse: Callable[[Any], Any], respond: Callable[[Any, Any], R]
    ) -> R:
        """What comes of a request; what is large is read and written in threads."""
        job = await parsed(parse, request)
        made = await self.texts.do(caller().tenant, job)
        return await parsed(respond, job, made)

    def _model(self, base_model: str) -> ModelDescription:
        """The model that is served, under its name or none."""
        model = self._describe()
        if model is None:
            raise ModelLoading
        if base_model not in ("", model.name):
            raise BaseModelNotFound(base_model, model.name)
        return model

    async def close(self) -> None:
        await self.texts.close()

    async def _files_of(self, model: ModelDescription) -> tuple[TokenizerFile, ...]:
        """Its tokenizer's, at once if they have been read: no thread is waited for."""
        if model.folder not in self._files:
            self._files[model.folder] = await asyncio.to_thread(tokenizer_files, model.folder)
        return self._files[model.folder]


def add_model_service(server: Any, servicer: ModelServicer) -> None:
    """Adds the service to an `RpcServer`."""
    server.add(model_pb2_grpc.add_ModelServiceServicer_to_server, servicer, SERVICE)
    server.close_by(servicer.close)


@lru_cache(maxsize=1)
def tokenizer_files(folder: str) -> tuple[TokenizerFile, ...]:
    """Reads the tokenizer's files of a model's folder, which do not change while it is served."""
    files = []
    for name in _TOKENIZER_FILES:
        path = Path(folder, name)
        if path.is_file():
            content = path.read_bytes()
            files.append(TokenizerFile(name, content, hashlib.sha256(content).hexdigest()))
    return tuple(files)


def _base_model(model: ModelDescription, files: tuple[TokenizerFile, ...]) -> model_pb2.BaseModel:
    lines = "".join(f"{file.sha256} {file.name}\n" for file in files)
    layers, experts, per_token = model.routed or (0, 0, 0)
    return model_pb2.BaseModel(
        name=model.name,
        context_length=model.context_length,
        vocabulary_size=model.vocabulary_size,
        max_lora_rank=model.max_lora_rank,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        device=model.device,
        tokenizer_fingerprint=hashlib.sha256(lines.encode()).hexdigest(),
        eos_token_ids=model.eos_token_ids,
        text_only=model.text_only,
        expert_layers=layers,
        experts=experts,
        experts_per_token=per_token,
    )
