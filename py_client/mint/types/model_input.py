"""What a model reads."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mint.errors import InvalidInputError, refused
from mint.types._checks import USE_FROM_INTS, choice, ids_in, integers_of
from mintrpc.v1 import types_pb2

_MAX_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class EncodedTextChunk:
    """Text as token ids."""

    tokens: list[int]
    type: Literal["encoded_text"] = "encoded_text"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", token_list(self.tokens, "tokens"))

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.tokens)

    def fields(self) -> dict[str, Any]:
        """Of its message, which would be copied into the one around it."""
        return {"encoded_text": {"tokens": self.tokens}}


class _Image:
    """What images have in common. Their type is the name of their message among the chunks."""

    __slots__ = ()
    format: Literal["png", "jpeg"]
    expected_tokens: int | None

    @property
    def length(self) -> int:
        """Tokens."""
        if self.expected_tokens is None:
            raise InvalidInputError(
                "the length of an image is unknown; set `expected_tokens`", field="expected_tokens"
            )
        return self.expected_tokens

    def fields(self) -> dict[str, Any]:
        """Of its message."""
        values: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        remedy = "it must be 'png' or 'jpeg'"
        values["format"] = choice(types_pb2.ImageFormat, self.format, "format", remedy)
        return {values.pop("type"): values}


@dataclass(frozen=True, slots=True)
class ImageChunk(_Image):
    """An image file sent with the request."""

    data: bytes
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None
    type: Literal["image"] = "image"


@dataclass(frozen=True, slots=True)
class ImageAssetPointerChunk(_Image):
    """An image named by its location, which the server reads."""

    format: Literal["png", "jpeg"]
    location: str
    expected_tokens: int | None = None
    type: Literal["image_asset_pointer"] = "image_asset_pointer"


ModelInputChunk = EncodedTextChunk | ImageChunk | ImageAssetPointerChunk


@dataclass(frozen=True, slots=True)
class ModelInput:
    """The concatenation of its chunks."""

    chunks: list[ModelInputChunk]

    def __post_init__(self) -> None:
        chunks = list(self.chunks)
        for index, chunk in enumerate(chunks):
            if not isinstance(chunk, ModelInputChunk):
                what = f"is a {type(chunk).__name__}; {USE_FROM_INTS}"
                raise refused(f"chunks[{index}]", what)
        object.__setattr__(self, "chunks", chunks)

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> "ModelInput":
        """An input of token ids, out of a list, iterator, numpy array or torch tensor, or out of
        the mapping that a tokenizer gives."""
        return cls([EncodedTextChunk(tokens)])  # type: ignore[arg-type]

    @classmethod
    def empty(cls) -> "ModelInput":
        """One of no tokens, to append to."""
        return cls([])

    @property
    def length(self) -> int:
        """Tokens in total."""
        return sum(chunk.length for chunk in self.chunks)

    def to_ints(self) -> list[int]:
        """All token ids. Refused if there is an image among them."""
        tokens: list[int] = []
        for index, chunk in enumerate(self.chunks):
            if not isinstance(chunk, EncodedTextChunk):
                raise refused(f"chunks[{index}]", f"is a {chunk.type}, which has no token ids")
            tokens.extend(chunk.tokens)
        return tokens

    def append(self, chunk: ModelInputChunk) -> "ModelInput":
        """This input and `chunk` after it."""
        return ModelInput([*self.chunks, chunk])

    def append_int(self, token: int) -> "ModelInput":
        """This input and one token after it."""
        if self.chunks and isinstance(self.chunks[-1], EncodedTextChunk):
            last = EncodedTextChunk([*self.chunks[-1].tokens, token])
            return ModelInput([*self.chunks[:-1], last])
        return self.append(EncodedTextChunk([token]))

    def to_proto(self) -> types_pb2.ModelInput:
        return types_pb2.ModelInput(**message_fields(self))


def message_fields(model_input: ModelInput) -> dict[str, Any]:
    """Of its message, for the message around it."""
    return {"chunks": [chunk.fields() for chunk in model_input.chunks]}


def token_list(tokens: Iterable[int], field: str) -> list[int]:
    """Token ids as plain integers. What no vocabulary can hold is refused."""
    array = integers_of(ids_in(tokens), field)
    if array.ndim != 1:
        raise refused(field, f"has {array.ndim} dimensions; give a flat list of token ids")
    wrong = (array < 0) | (array > _MAX_TOKEN_ID)
    if wrong.any():
        index = int(wrong.argmax())
        raise InvalidInputError(
            f"`{field}[{index}]` is {array[index]}, which is not a token id", field=field
        )
    ids: list[int] = array.tolist()
    return ids
