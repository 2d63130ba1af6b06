"""The example client on bare stubs: what those in examples/ do, and what their output is compared
with. Addresses, key and certificates come from the environment; one line of JSON goes out.
"""

import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from mintrpc.v1 import (
    model_pb2,
    model_pb2_grpc,
    sampler_pb2,
    sampler_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
    types_pb2,
)

MOST_STEPS = 32
LEARNING_RATE = 0.002
LEARNED = 0.1  # of the first loss
PATIENCE_S = 120.0  # with one call
CALL_LIMIT_S = 30.0  # any will do: what has not come by then is asked for again
PAUSE_S = 0.1
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


class Refused(Exception):
    """The server's own word, and final."""

    def __init__(self, error: grpc.RpcError, info: error_details_pb2.ErrorInfo, field: str) -> None:
        super().__init__(f"{info.reason}: {error.details()}")
        self.code = error.code().name
        self.reason = info.reason
        self.field = field
        self.next_sequence = info.metadata.get("next_sequence")  # None: not recorded


def channel(address: str) -> grpc.Channel:
    scheme, found, target = address.partition("://")
    if scheme != "https":
        return grpc.insecure_channel(target if found else address, OPTIONS)

    def pem(name: str) -> bytes | None:
        return Path(os.environ[name]).read_bytes() if os.environ.get(name) else None

    credentials = grpc.ssl_channel_credentials(
        pem("MINT_TLS_CA"), pem("MINT_TLS_KEY"), pem("MINT_TLS_CERT")
    )
    return grpc.secure_channel(target, credentials, OPTIONS)


def insist(call: Callable[..., Any], request: Any) -> Any:
    """Sends a request until there is an answer. Raises Refused."""
    key = os.environ.get("MINT_API_KEY")
    metadata = [("authorization", f"Bearer {key}")] if key else []
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            answer = call(request, timeout=CALL_LIMIT_S, metadata=metadata)
            # A stream that breaks off is asked for again from its start.
            return list(answer) if isinstance(answer, Iterator) else answer
        except grpc.RpcError as error:
            pause_s = _pause_s(error)  # raises what is final
            if time.monotonic() + pause_s > until:
                raise
            sys.stderr.write(f"again in {pause_s} s: {error.details()}\n")
            time.sleep(pause_s)


def _pause_s(error: grpc.RpcError) -> float:
    """How long to wait before the same request is sent again. Raises Refused if that is no use."""
    info = error_details_pb2.ErrorInfo()
    bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    status = rpc_status.from_call(error)
    for detail in status.details if status else []:
        if detail.Unpack(retry):
            return retry.retry_delay.ToTimedelta().total_seconds()
        _ = detail.Unpack(info) or detail.Unpack(bad)
    if info.domain != "mint" or error.code() is grpc.StatusCode.UNAVAILABLE:
        return PAUSE_S
    field = bad.field_violations[0].field if bad.field_violations else ""
    raise Refused(error, info, field)


class Run:
    """A training run, whose calls go one after the other."""

    def __init__(self, stub: trainer_pb2_grpc.TrainerServiceStub) -> None:
        lora = types_pb2.LoraConfig(rank=4, seed=7)
        request = trainer_pb2.CreateTrainingRunRequest(
            request_id=uuid.uuid4().hex, lora_config=lora
        )
        answer = insist(stub.CreateTrainingRun, request)
        self._stub = stub
        self._id = answer.training_run.training_run_id
        self._writer_epoch = answer.writer_epoch
        self._next_sequence = 1

    def send(self, request: Any) -> Any:
        """Gives a request its number and sends it. Raises Refused."""
        request.training_run_id = self._id
        request.writer_epoch = self._writer_epoch
        request.sequence = self._next_sequence
        request.acknowledged_sequence = self._next_sequence - 1
        method = type(request).__name__.removesuffix("Request")
        try:
            answer = insist(getattr(self._stub, method), request)
        except Refused as error:
            # An error that names no next number is not recorded, and has used none up.
            self._next_sequence = int(error.next_sequence or self._next_sequence)
            raise
        self._next_sequence += 1
        return answer


def model_input(tokens: Any) -> types_pb2.ModelInput:
    chunk = types_pb2.ModelInputChunk(encoded_text=types_pb2.EncodedTextChunk(tokens=tokens))
    return types_pb2.ModelInput(chunks=[chunk])


def tensor(values: Any, name: str, dtype: str) -> types_pb2.TensorData:
    array = np.array(values, dtype)
    return types_pb2.TensorData(
        dtype=types_pb2.TensorDtype.Value(f"TENSOR_DTYPE_{name}"),
        shape=array.shape,
        values=array.tobytes(),
    )


def forward_backward(tokens: Any, targets: Any, weights: Any) -> Any:
    datum = types_pb2.Datum(
        model_input=model_input(tokens),
        loss_fn_inputs={
            "target_tokens": tensor(targets, "INT64", "<i8"),
            "weights": tensor(weights, "FLOAT32", "<f4"),
        },
    )
    return trainer_pb2.ForwardBackwardRequest(data=[datum], cross_entropy=types_pb2.CrossEntropy())


def optim_step() -> Any:
    adam = types_pb2.AdamParams(learning_rate=LEARNING_RATE)
    return trainer_pb2.OptimStepRequest(adam_params=adam)


def refusal(run: Run, tokens: Any, weights: Any) -> dict[str, str]:
    """How the server refuses a token that there is not."""
    targets = [2_000_000_000, *tokens[2:]]
    try:
        run.send(forward_backward(tokens[:-1], targets, weights[1:]))
    except Refused as error:
        return {"code": error.code, "reason": error.reason, "field": error.field}
    raise SystemExit("the server took a token that there is not")


def wait_for_model(model: model_pb2_grpc.ModelServiceStub) -> None:
    """A server that starts answers before it knows its model."""
    until = time.monotonic() + PATIENCE_S
    request = model_pb2.GetServerCapabilitiesRequest()
    while not insist(model.GetServerCapabilities, request).base_models:
        assert time.monotonic() < until, "the server has no base model"
        time.sleep(PAUSE_S)


def render(model: model_pb2_grpc.ModelServiceStub, *messages: Any, **options: Any) -> Any:
    """A conversation as tokens."""
    chat = model_pb2.Chat(messages=messages)
    request = model_pb2.RenderChatRequest(chats=[chat], renderer="role_colon", **options)
    return insist(model.RenderChat, request).chats[0]


def learn(run: Run, tokens: Any, weights: Any) -> list[float]:
    """Steps until the answer is learned: the loss of each."""
    losses: list[float] = []
    while not losses or losses[-1] > LEARNED * losses[0]:
        if len(losses) == MOST_STEPS:
            raise SystemExit(f"the loss has not fallen to a tenth of the first: {losses}")
        passed = run.send(forward_backward(tokens[:-1], tokens[1:], weights[1:]))
        losses.append(passed.metrics["loss:sum"])
        run.send(optim_step())
        sys.stderr.write(f"step {len(losses)}: loss {losses[-1]:.3f}\n")
    return losses


def train(trainer: grpc.Channel, rendered: Any) -> tuple[list[float], dict[str, str], str]:
    """The losses, the refusal of what is wrong, and the path of the weights."""
    tokens, weights = list(rendered.tokens), list(rendered.weights)
    run = Run(trainer_pb2_grpc.TrainerServiceStub(trainer))
    losses = learn(run, tokens, weights)
    refused = refusal(run, tokens, weights)
    run.send(trainer_pb2.DiscardGradientRequest())
    saved = run.send(trainer_pb2.SaveWeightsForSamplerRequest(name="final"))
    return losses, refused, saved.path


def sample(sampler: grpc.Channel, path: str, prompt: Any) -> tuple[list[int], list[int]]:
    """The same tokens, as a whole and as they come."""
    request = sampler_pb2.SampleRequest(
        model_path=path,
        prompt=model_input(prompt),
        sampling_params=sampler_pb2.SamplingParams(temperature=0, max_tokens=8, seed=1),
    )
    stub = sampler_pb2_grpc.SamplerServiceStub(sampler)
    whole = insist(stub.Sample, request).sequences[0].tokens
    pieces = insist(stub.StreamSample, sampler_pb2.StreamSampleRequest(sample=request))
    return list(whole), [token for piece in pieces for token in piece.tokens]


def main() -> None:
    trainer = channel(os.environ["MINT_BASE_URL"])
    model = model_pb2_grpc.ModelServiceStub(trainer)
    wait_for_model(model)
    question = model_pb2.ChatMessage(role="user", content="What is 2 + 3?")
    answer = model_pb2.ChatMessage(role="assistant", content="5")
    every_answer = model_pb2.TRAIN_ON_WHAT_ALL_ASSISTANT_MESSAGES
    losses, refused, path = train(
        trainer, render(model, question, answer, train_on_what=every_answer)
    )
    prompt = render(model, question, add_generation_prompt=True).tokens
    tokens, streamed = sample(channel(os.environ["MINT_SAMPLER_URL"]), path, prompt)
    sequence = model_pb2.TokenSequence(tokens=tokens)
    told = insist(model.Detokenize, model_pb2.DetokenizeRequest(sequences=[sequence]))
    outcome = {
        "losses": losses,
        "refused": refused,
        "tokens": tokens,
        "streamed": streamed,
        "text": told.texts[0],
    }
    sys.stdout.write(json.dumps(outcome) + "\n")


if __name__ == "__main__":
    main()
