"""Data of training requests: protobuf tensors in, checked documents out."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mint_core.engine_pipe import ModelDescription
from mint_core.errors import InvalidRequest, Unimplemented
from mintrpc.v1 import types_pb2
from trainer_service.jobs import CrossEntropy, Document, Floats, Loss

TARGETS = "target_tokens"

_DTYPES: Mapping[int, np.dtype[np.generic]] = {
    types_pb2.TENSOR_DTYPE_FLOAT32: np.dtype("<f4"),
    types_pb2.TENSOR_DTYPE_INT64: np.dtype("<i8"),
    types_pb2.TENSOR_DTYPE_INT32: np.dtype("<i4"),
}


def parse_datum(datum: types_pb2.Datum, path: str, loss: Loss, model: ModelDescription) -> Document:
    """Checks one datum of a batch; `path` is where it stands in the request."""
    tokens = _tokens(datum.model_input, f"{path}.model_input", model)
    inputs = datum.loss_fn_inputs
    where = f"{path}.loss_fn_inputs"
    _check_names(set(inputs), where, loss)
    targets = _array(
        inputs[TARGETS], f"{where}.{TARGETS}", types_pb2.TENSOR_DTYPE_INT64, len(tokens)
    )
    floats = {
        name: _floats(inputs[name], f"{where}.{name}", len(tokens))
        for name in ("weights", "logprobs", "advantages")
        if name in inputs
    }
    return Document(
        tokens=tokens,
        targets=_in_vocabulary(targets.astype(np.int64, copy=False), f"{where}.{TARGETS}", model),
        weights=floats["weights"] if "weights" in floats else np.ones(len(tokens), np.float32),
        logprobs=floats.get("logprobs"),
        advantages=floats.get("advantages"),
    )


def _tokens(
    model_input: types_pb2.ModelInput, path: str, model: ModelDescription
) -> NDArray[np.int64]:
    pieces = []
    for index, chunk in enumerate(model_input.chunks):
        kind = chunk.WhichOneof("chunk")
        if kind is None:
            raise InvalidRequest(
                f"`{path}.chunks[{index}]` is empty; give it `encoded_text`",
                field=f"{path}.chunks[{index}]",
            )
        if kind != "encoded_text":
            raise Unimplemented(
                f"`{path}.chunks[{index}].{kind}`: base model {model.name} reads no images; send "
                "text",
                field=f"{path}.chunks[{index}].{kind}",
            )
        pieces.append(np.array(chunk.encoded_text.tokens, np.int64))
    tokens = pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.int64), *pieces])
    if not len(tokens):
        raise InvalidRequest(f"`{path}` has no tokens; it needs at least one", field=path)
    if len(tokens) > model.context_length:
        limit = (
            f"the memory at hand holds {model.context_length} of one sequence; shorten or split "
            "it, or start the trainer where more is free"
            if model.memory_bound
            else f"the context of {model.name} is {model.context_length}; shorten the sequence"
        )
        raise InvalidRequest(
            f"`{path}` has {len(tokens)} tokens but {limit}",
            field=path,
            tokens=len(tokens),
            context_length=model.context_length,
        )
    return _in_vocabulary(tokens, path, model)


def _in_vocabulary(
    tokens: NDArray[np.int64], path: str, model: ModelDescription
) -> NDArray[np.int64]:
    if tokens.min() < 0 or tokens.max() >= model.vocabulary_size:
        bad = np.flatnonzero((tokens < 0) | (tokens >= model.vocabulary_size))
        token = int(tokens[bad[0]])
        raise InvalidRequest(
            f"`{path}` has token id {token} at position {bad[0]}, outside the vocabulary of "
            f"{model.name} "
            f"(0 to {model.vocabulary_size - 1}); use this model's tokenizer, and any valid id "
            "where the weight is 0",
            field=path,
            token_id=token,
            position=bad[0],
            vocabulary_size=model.vocabulary_size,
        )
    return tokens


def _check_names(names: set[str], path: str, loss: Loss) -> None:
    needed = {TARGETS} if isinstance(loss, CrossEntropy) else {TARGETS, "logprobs", "advantages"}
    known = needed | {"weights"}
    if missing := sorted(needed - names):
        raise InvalidRequest(
            f"`{path}` lacks {_quoted(missing)}, which this loss needs; add one entry per token",
            field=f"{path}.{missing[0]}",
            missing=", ".join(missing),
        )
    if unknown := sorted(names - known):
        raise InvalidRequest(
            f"`{path}` has {_quoted(unknown)}, which this loss does not read; it reads "
            f"{_quoted(sorted(known))}",
            field=f"{path}.{unknown[0]}",
            unknown=", ".join(unknown),
        )


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _floats(tensor: types_pb2.TensorData, path: str, length: int) -> Floats:
    array = _array(tensor, path, types_pb2.TENSOR_DTYPE_FLOAT32, length).astype(
        np.float32, copy=False
    )
    finite = np.isfinite(array)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise InvalidRequest(
            f"`{path}` has {array[bad[0]]} at position {bad[0]}; all its values must be finite",
            field=path,
            value=array[bad[0]],
            position=bad[0],
        )
    return array


def _array(
    tensor: types_pb2.TensorData, path: str, wanted: int, length: int
) -> NDArray[np.generic]:
    """Reads a tensor that must have one dimension of `length` values."""
    if tensor.dtype != wanted:
        raise InvalidRequest(
            f"`{path}.dtype` is {_dtype_name(tensor.dtype)} but must be {_dtype_name(wanted)}; "
            "convert the values",
            field=f"{path}.dtype",
            dtype=_dtype_name(tensor.dtype),
        )
    dtype, values = _DTYPES[wanted], tensor.values
    count, rest = divmod(len(values), dtype.itemsize)
    shape = tuple(tensor.shape) or (count,)
    if rest or min(shape) < 0 or math.prod(shape) != count:
        raise InvalidRequest(
            f"`{path}.values` has {len(values)} bytes, which is not {dtype.itemsize} times the "
            f"product of shape {list(shape)}; send every value once",
            field=f"{path}.values",
            size_bytes=len(values),
        )
    if shape != (length,):
        raise InvalidRequest(
            f"`{path}` has shape {list(shape)} but `model_input` has {length} tokens; give one "
            "value per token",
            field=path,
            shape=list(shape),
            tokens=length,
        )
    return np.frombuffer(values, dtype)


def _dtype_name(dtype: int) -> str:
    if dtype in types_pb2.TensorDtype.values():
        return str(types_pb2.TensorDtype.Name(types_pb2.TensorDtype.ValueType(dtype)))
    return str(dtype)
