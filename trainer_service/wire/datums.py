"""Data of training requests: protobuf in, checked documents out."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import InvalidRequest, Unimplemented
from mintrpc.v1 import types_pb2
from trainer_service.jobs import Cispo, CrossEntropy, Document, Floats, Gspo, Loss, Ppo
from trainer_service.wire.routed_experts import parse_routed_experts
from trainer_service.wire.tensors import read_floats, read_integers

TARGETS = "target_tokens"
MASK = "sequence_ratio_mask"
CLIPS = ("clip_low_threshold", "clip_high_threshold")


def parse_datum(datum: types_pb2.Datum, path: str, loss: Loss, model: ModelDescription) -> Document:
    """Checks one datum of a batch; `path` is where it stands in the request."""
    tokens = _tokens(datum.model_input, f"{path}.model_input", model)
    inputs = datum.loss_fn_inputs
    where = f"{path}.loss_fn_inputs"
    _check_names(set(inputs), where, loss)
    targets = _targets(inputs[TARGETS], f"{where}.{TARGETS}", len(tokens), loss)
    floats = {
        name: read_floats(tensor, f"{where}.{name}", targets.shape)
        for name, tensor in sorted(inputs.items())
        if name != TARGETS
    }
    document = Document(
        tokens=tokens,
        targets=_in_vocabulary(targets, f"{where}.{TARGETS}", model),
        weights=floats["weights"] if "weights" in floats else np.ones(targets.shape, np.float32),
        logprobs=floats.get("logprobs"),
        advantages=floats.get("advantages"),
        clip_low=floats.get(CLIPS[0]),
        clip_high=floats.get(CLIPS[1]),
        routed=parse_routed_experts(
            datum.routed_experts, f"{path}.routed_experts", len(tokens), model
        ),
    )
    _check_clips(document, where, loss)
    if not isinstance(loss, Gspo):
        return document
    mask = _ratio_mask(floats.get(MASK), f"{where}.{MASK}", document)
    return replace(document, ratio_mask=mask)


def _targets(
    tensor: types_pb2.TensorData, path: str, length: int, loss: Loss
) -> NDArray[np.int64]:  # [n] or [n, k]
    wide = isinstance(loss, CrossEntropy) and len(tensor.shape) == 2 and tensor.shape[1] > 0
    shape = (length, int(tensor.shape[1])) if wide else (length,)
    return read_integers(tensor, path, shape)


def _check_clips(document: Document, where: str, loss: Loss) -> None:
    """Refuses thresholds between which nothing lies."""
    if document.clip_low is None and document.clip_high is None:
        return
    assert isinstance(loss, Ppo | Cispo | Gspo)
    low = loss.clip_low_threshold if document.clip_low is None else document.clip_low
    high = loss.clip_high_threshold if document.clip_high is None else document.clip_high
    wrong = np.flatnonzero(np.less(low, 0) | np.less(high, low))
    if len(wrong):
        name = CLIPS[1] if document.clip_low is None else CLIPS[0]
        raise InvalidRequest(
            f"`{where}.{name}` clips to nothing at position {wrong[0]}; the low threshold must be "
            "at least 0 and the high one at least the low one, such as 0.8 and 1.2",
            field=f"{where}.{name}",
            position=wrong[0],
        )


def _ratio_mask(given: Floats | None, path: str, document: Document) -> Floats:
    """The tokens of the sequence; without a mask those that have a part in the loss."""
    if given is None:
        assert document.advantages is not None
        read = (document.weights != 0) & (document.advantages != 0)
        return np.asarray(read, np.float32)
    wrong = np.flatnonzero((given != 0) & (given != 1))
    if len(wrong):
        raise InvalidRequest(
            f"`{path}` has {given[wrong[0]]} at position {wrong[0]}; give 1 for tokens of the "
            "sequence whose ratio is taken, else 0",
            field=path,
            value=given[wrong[0]],
            position=wrong[0],
        )
    return given


def _tokens(
    model_input: types_pb2.ModelInput, path: str, model: ModelDescription
) -> NDArray[np.int64]:
    _check_length(sum(len(c.encoded_text.tokens) for c in model_input.chunks), path, model)
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
        pieces.append(np.array(chunk.encoded_text.tokens[:], np.int64))  # a list is read faster
    tokens = pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.int64), *pieces])
    if not len(tokens):
        raise InvalidRequest(f"`{path}` has no tokens; it needs at least one", field=path)
    return _in_vocabulary(tokens, path, model)


def _check_length(tokens: int, path: str, model: ModelDescription) -> None:
    if tokens <= model.context_length:
        return
    limit = (
        f"the memory at hand holds {model.context_length} of one sequence; shorten or split "
        "it, or start the trainer where more is free"
        if model.memory_bound
        else f"the context of {model.name} is {model.context_length}; shorten the sequence"
    )
    raise InvalidRequest(
        f"`{path}` has {tokens} tokens but {limit}",
        field=path,
        tokens=tokens,
        context_length=model.context_length,
    )


def _in_vocabulary(
    tokens: NDArray[np.int64], path: str, model: ModelDescription
) -> NDArray[np.int64]:
    if tokens.view(np.uint64).max() >= model.vocabulary_size:  # as those below 0 are then
        flat = tokens.ravel()
        bad = np.flatnonzero((flat < 0) | (flat >= model.vocabulary_size))
        token = int(flat[bad[0]])
        raise InvalidRequest(
            f"`{path}` has token id {token} at position {bad[0]}, outside the vocabulary of "
            f"{model.name} (0 to {model.vocabulary_size - 1}); use this model's tokenizer, and any "
            "valid id where the weight is 0",
            field=path,
            token_id=token,
            position=bad[0],
            vocabulary_size=model.vocabulary_size,
        )
    return tokens


def _check_names(names: set[str], path: str, loss: Loss) -> None:
    needed = {TARGETS} if isinstance(loss, CrossEntropy) else {TARGETS, "logprobs", "advantages"}
    known = needed | {"weights"}
    if isinstance(loss, Ppo | Cispo | Gspo):
        known |= set(CLIPS)
    if isinstance(loss, Gspo):
        known |= {MASK}
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
