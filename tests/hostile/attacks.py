"""What one tenant sends to stop the others. Each attack says how the servers may answer it."""

import itertools
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from mintrpc.v1 import checkpoint_pb2, model_pb2, sampler_pb2, trainer_pb2, types_pb2

LIMIT_S = 120.0
DETAILS = "grpc-status-details-bin"
Code = grpc.StatusCode
BAD = frozenset({Code.INVALID_ARGUMENT})
FULL = frozenset({Code.RESOURCE_EXHAUSTED})
OK = frozenset({Code.OK})
FAILED = frozenset({Code.FAILED_PRECONDITION})
LEFT = frozenset({Code.CANCELLED, Code.DEADLINE_EXCEEDED})


@dataclass(frozen=True, slots=True)
class Hostile:
    """A tenant's way to both services. `size` is that of the largest messages, in MiB. `root` is a
    key that may administer, and nothing else.
    """

    trainer: grpc.Channel
    sampler: grpc.Channel
    key: str
    size: int
    root: str

    def metadata(self, key: str | None = None) -> list[tuple[str, str]]:
        return [("x-api-key", self.key if key is None else key)]

    def send(
        self,
        method: str,
        raw: bytes | Message,
        *,
        key: str | None = None,
        limit_s: float = LIMIT_S,
        to: grpc.Channel | None = None,  # of what both services answer; None: the trainer
    ) -> tuple[Code, bytes]:
        """What becomes of a request, which need not be a message: the answer, or the details of an
        error, if they are ours.
        """
        content = raw if isinstance(raw, bytes) else raw.SerializeToString()
        channel = self.sampler if method.startswith("SamplerService/") else to or self.trainer
        call = channel.unary_unary(f"/mintrpc.v1.{method}")
        try:
            return Code.OK, call(content, timeout=limit_s, metadata=self.metadata(key))
        except grpc.RpcError as error:
            return error.code(), dict(error.trailing_metadata() or ()).get(DETAILS, b"")

    def expect(self, codes: frozenset[Code], method: str, raw: bytes | Message, **how: Any) -> None:
        code, answer = self.send(method, raw, **how)
        assert code in codes, f"{method} was answered {code} and not {codes}: {answer!r}"

    @contextmanager
    def run(self) -> Iterator[str]:
        """A run of its own, which is deleted."""
        request = trainer_pb2.CreateTrainingRunRequest(
            request_id=uuid.uuid4().hex, lora_config={"rank": 2, "seed": 1}
        )
        code, answer = self.send("TrainerService/CreateTrainingRun", request)
        assert code == Code.OK, code
        name = trainer_pb2.CreateTrainingRunResponse.FromString(answer).training_run
        yield name.training_run_id
        self.expect(
            OK,
            "TrainerService/DeleteTrainingRun",
            trainer_pb2.DeleteTrainingRunRequest(
                training_run_id=name.training_run_id, request_id=uuid.uuid4().hex
            ),
        )


def ints(tensor: list[int]) -> types_pb2.TensorData:
    values = b"".join(value.to_bytes(8, "little") for value in tensor)
    return types_pb2.TensorData(dtype=types_pb2.TENSOR_DTYPE_INT64, values=values)


def datum(**inputs: types_pb2.TensorData) -> types_pb2.Datum:
    tokens = types_pb2.ModelInput(chunks=[{"encoded_text": {"tokens": [1, 2]}}])
    return types_pb2.Datum(
        model_input=tokens, loss_fn_inputs={"target_tokens": ints([2, 3]), **inputs}
    )


def floats(*values: float) -> types_pb2.TensorData:
    import numpy as np

    content = np.array(values, "<f4").tobytes()
    return types_pb2.TensorData(dtype=types_pb2.TENSOR_DTYPE_FLOAT32, values=content)


def compute(run: str, sequence: int, *data: types_pb2.Datum, **loss: Any) -> Message:
    return trainer_pb2.ForwardBackwardRequest(
        training_run_id=run,
        sequence=sequence,
        writer_epoch=1,
        data=data,
        **(loss or {"cross_entropy": {}}),
    )


FORWARD_BACKWARD = "TrainerService/ForwardBackward"
SAMPLE = "SamplerService/Sample"


def shapes(hostile: Hostile) -> None:
    tensor = types_pb2.TensorData(dtype=2, shape=[2**63 - 1] * 150_000, values=b"\0" * 8)
    with hostile.run() as run:
        for target, codes in ((run, BAD), ("no-such-run", BAD | {Code.NOT_FOUND})):
            request = compute(target, 1, datum(target_tokens=tensor))
            hostile.expect(codes, FORWARD_BACKWARD, request)


def modules(hostile: Hostile) -> None:
    names = [f"layer.{i}" for i in range(40_000)]
    request = trainer_pb2.CreateTrainingRunRequest(
        request_id="m", lora_config={"rank": 1, "target_modules": names}
    )
    hostile.expect(BAD, "TrainerService/CreateTrainingRun", request)


def numbers(hostile: Hostile) -> None:
    """Beyond float32, at its edge, and what only becomes too large on the way."""
    policy = {"logprobs": floats(-1, -1), "advantages": floats(1, 1)}
    beyond, edge = 1e39, 3.4028234663852886e38
    with hostile.run() as run:
        sequence = itertools.count(1)
        for loss in ("ppo", "cispo", "gspo"):
            for high, codes in ((beyond, BAD), (edge, OK), (float("inf"), BAD)):
                clip = {loss: {"clip_high_threshold": high}}
                request = compute(run, next(sequence), datum(**policy), **clip)
                hostile.expect(codes, FORWARD_BACKWARD, request)
        far = {"logprobs": floats(-3e38, -1), "advantages": floats(3e38, -3e38)}
        for loss in ("importance_sampling", "ppo", "cispo", "gspo"):
            request = compute(run, next(sequence), datum(**far), **{loss: {}})
            hostile.expect(OK | BAD | FAILED, FORWARD_BACKWARD, request)
        hostile.expect(
            OK | BAD | FAILED,
            FORWARD_BACKWARD,
            compute(run, next(sequence), datum(**far), dro={"beta": edge}),
        )
        for adam in ({"eps": 0.0}, {"eps": 1e-50}, {"learning_rate": 1e300}, {"beta1": 1.0}):
            request = trainer_pb2.OptimStepRequest(
                training_run_id=run, sequence=next(sequence), writer_epoch=1, adam_params=adam
            )
            hostile.expect(BAD, "TrainerService/OptimStep", request)
        for adam in ({"learning_rate": edge}, {"weight_decay": edge, "learning_rate": 1.0}):
            hostile.expect(OK, FORWARD_BACKWARD, compute(run, next(sequence), datum()))
            request = trainer_pb2.OptimStepRequest(
                training_run_id=run, sequence=next(sequence), writer_epoch=1, adam_params=adam
            )
            hostile.expect(OK | FAILED, "TrainerService/OptimStep", request)
    for alpha, codes in ((1e308, BAD), (-1.0, BAD), (float("nan"), BAD)):
        request = trainer_pb2.CreateTrainingRunRequest(
            request_id=uuid.uuid4().hex, lora_config={"rank": 1, "alpha": alpha}
        )
        hostile.expect(codes, "TrainerService/CreateTrainingRun", request)


def wide_targets(hostile: Hostile) -> None:
    k = hostile.size * 2**20 // 8
    wide = types_pb2.TensorData(dtype=2, shape=[2, k // 2], values=b"\0" * (8 * (k // 2) * 2))
    with hostile.run() as run:
        hostile.expect(
            OK | BAD | FULL, FORWARD_BACKWARD, compute(run, 1, datum(target_tokens=wide))
        )


def long_texts(hostile: Hostile) -> None:
    text = "é" * (hostile.size * 2**19)
    hostile.expect(
        BAD,
        "TrainerService/GetTrainingRun",
        trainer_pb2.GetTrainingRunRequest(training_run_id=text),
    )
    for field in ("model_path", "base_model"):
        hostile.expect(BAD, SAMPLE, sampler_pb2.SampleRequest(**{field: text}))
    for name in ("..", "../x", "a\0b", "x" * 200, "/etc/passwd"):
        request = trainer_pb2.GetTrainingRunRequest(training_run_id=name)
        hostile.expect(BAD, "TrainerService/GetTrainingRun", request)


def many(hostile: Hostile) -> None:
    """Lists without end: of messages, of numbers, of texts."""
    count = hostile.size * 2**19
    place = trainer_pb2.ForwardBackwardRequest(
        training_run_id="r", sequence=1, writer_epoch=1
    ).SerializeToString()
    hostile.expect(BAD | {Code.NOT_FOUND}, FORWARD_BACKWARD, place + b"\x2a\x00" * count)
    chunks = sampler_pb2.SampleRequest(prompt={"chunks": [{}] * min(count, 100_000)})
    hostile.expect(BAD, SAMPLE, chunks)
    prompt = types_pb2.ModelInput(chunks=[{"encoded_text": {"tokens": [1] * count}}])
    hostile.expect(BAD, SAMPLE, sampler_pb2.SampleRequest(prompt=prompt))
    short = types_pb2.ModelInput(chunks=[{"encoded_text": {"tokens": [1, 2, 3]}}])
    for params in (
        {"stop_token_ids": [3] * count},
        {"stop": ["x"] * 1000},
        {"stop": ["x" * 10_000]},
        {"temperature": 1e300},
        {"json_schema": '{"type": "integer", "minimum": -9223372036854775808, '
                        '"maximum": -9223372036854775808}'},
    ):  # fmt: skip
        request = sampler_pb2.SampleRequest(
            prompt=short, sampling_params={"max_tokens": 2, **params}
        )
        hostile.expect(BAD if "json_schema" not in params else BAD | OK, SAMPLE, request)
    request = sampler_pb2.SampleRequest(
        prompt=short,
        sampling_params={"max_tokens": 2, "stop": [f"{i} no" for i in range(256)]},
        num_samples=16,
    )
    hostile.expect(OK, SAMPLE, request)


def without_a_key(hostile: Hostile) -> None:
    raw = b"\x2a\x00" * (hostile.size * 2**19)
    for method in (FORWARD_BACKWARD, SAMPLE):
        hostile.expect(frozenset({Code.UNAUTHENTICATED}), method, raw, key="sk-mint-none")


def early_arrivals(hostile: Hostile) -> None:
    """Calls whose turn does not come, held with all that they carry, and left by their callers."""
    values = types_pb2.TensorData(dtype=2, values=b"\0" * 16 * 2**10)
    with hostile.run() as run:
        calls = []
        for sequence in range(2, 34):
            request = compute(run, sequence, *[datum(weights=values)] * 8).SerializeToString()
            call = hostile.trainer.unary_unary(f"/mintrpc.v1.{FORWARD_BACKWARD}")
            calls.append(call.future(request, timeout=LIMIT_S, metadata=hostile.metadata()))
        for call in calls:
            call.cancel()


def deletions(hostile: Hostile) -> None:
    """Calls that meet the deletion of their run."""
    for _ in range(3):
        with hostile.run() as run:
            call = hostile.trainer.unary_unary(f"/mintrpc.v1.{FORWARD_BACKWARD}")
            calls = [
                call.future(
                    compute(run, sequence, datum()).SerializeToString(),
                    timeout=LIMIT_S,
                    metadata=hostile.metadata(),
                )
                for sequence in range(1, 9)
            ]
        for each in calls:
            assert each.code() in OK | {Code.NOT_FOUND}


def updates(hostile: Hostile) -> None:
    with hostile.run() as run:
        for _ in range(30):
            request = trainer_pb2.UpdateTrainingRunRequest(
                training_run_id=run, request_id=uuid.uuid4().hex, metadata={"k": "v" * 16_000}
            )
            hostile.expect(OK, "TrainerService/UpdateTrainingRun", request)


def uploads(hostile: Hostile) -> None:
    """Streams that say nothing, or say too much."""
    call = hostile.trainer.stream_unary("/mintrpc.v1.CheckpointService/UploadCheckpoint")
    piece = checkpoint_pb2.UploadCheckpointRequest(piece={"data": b"\0" * 2**20})
    for requests, codes in (
        (iter([piece.SerializeToString()] * hostile.size), BAD),
        (iter(()), BAD),
    ):
        try:
            call(requests, timeout=LIMIT_S, metadata=hostile.metadata())
        except grpc.RpcError as error:
            if error.code() not in codes:
                raise AssertionError(f"not one of {codes}") from error


def texts(hostile: Hostile) -> None:
    """What is long to turn into tokens, or back."""
    turn = [{"role": role, "content": "one é " * 550} for role in ("user", "assistant")]
    chat = model_pb2.RenderChatRequest(
        chats=[{"messages": turn * (8 * hostile.size)}],
        renderer="template",
        train_on_what=model_pb2.TRAIN_ON_WHAT_ALL_MESSAGES,
    )
    hostile.expect(OK | BAD | FULL, "ModelService/RenderChat", chat)
    tokens = {"tokens": [1] * (hostile.size * 16_000)}
    for method, request, codes in (
        (
            "Tokenize",
            model_pb2.TokenizeRequest(texts=["a" * (hostile.size * 65_000)]),
            OK | BAD | FULL,
        ),
        ("Tokenize", model_pb2.TokenizeRequest(texts=["a" * 4_194_305]), BAD),
        ("Detokenize", model_pb2.DetokenizeRequest(sequences=[tokens]), OK | BAD | FULL),
    ):
        hostile.expect(codes, f"ModelService/{method}", request)


def streams(hostile: Hostile) -> None:
    """Readers who leave at once, half of them streams that then go on for nobody."""
    call = hostile.sampler.unary_stream("/mintrpc.v1.SamplerService/StreamSample")
    prompt = types_pb2.ModelInput(chunks=[{"encoded_text": {"tokens": [1, 2, 3]}}])
    params = {"max_tokens": 40, "seed": 1}
    sample = sampler_pb2.SampleRequest(prompt=prompt, sampling_params=params)
    for i in range(10):
        request = sampler_pb2.StreamSampleRequest(sample=sample, request_id=str(i) * (i % 2))
        raw = request.SerializeToString()
        parts = call(raw, timeout=LIMIT_S, metadata=hostile.metadata())
        next(parts)
        parts.cancel()


def lists(hostile: Hostile) -> None:
    for _ in range(hostile.size):
        for method in ("TrainerService/ListTrainingRuns", "CheckpointService/ListCheckpoints"):
            hostile.expect(OK, method, b"")
        hostile.expect(
            frozenset({Code.NOT_FOUND}),
            SAMPLE,
            sampler_pb2.SampleRequest(
                model_path=f"mint://{uuid.uuid4().hex}/sampler_weights/a",
                prompt={"chunks": [{"encoded_text": {"tokens": [1]}}]},
            ),
        )


ATTACKS: tuple[Callable[[Hostile], None], ...] = (
    shapes,
    modules,
    numbers,
    wide_targets,
    long_texts,
    many,
    without_a_key,
    early_arrivals,
    deletions,
    updates,
    uploads,
    texts,
    streams,
    lists,
)
