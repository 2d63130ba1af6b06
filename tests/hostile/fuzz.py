"""Messages of every kind with numbers at the edges of what they may be, drawn from a seed."""

import importlib
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

from mintrpc.v1 import admin_pb2, model_pb2, sampler_pb2, trainer_pb2
from tests.hostile.attacks import Code, Hostile, compute, datum, floats

LIMIT_S = 5.0  # some wait by contract: watchers, early arrivals
MOST = 4  # elements of a list, but now and then
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1.2e-38, 3.4e38, 3.5e38, 1e300, 1e-300)
ODD = (float("inf"), -float("inf"), float("nan"))
INTS = (0, 1, 2, 3, 4, 7, -1, 100, 2**15, 2**31 - 1, -(2**31))
LONG_INTS = (*INTS, 2**31, 2**53 + 1, 2**63 - 1, -(2**63))
TEXTS = ("", "a", "..", "x" * 128, "x" * 2000, "é" * 600, "a\nb", "target_tokens", "weights")
NAMES = ("logprobs", "advantages", "sequence_ratio_mask", "clip_low_threshold", "q_proj")
# What the contract may answer; nothing else, and INTERNAL least of all.
BOTH = ("ModelService", "AdminService")  # which both services answer
LEGAL = frozenset(Code) - {Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS, Code.OUT_OF_RANGE}


_FLOATS = floats(-1.5, -0.5)
_POLICY = datum(logprobs=_FLOATS, advantages=floats(1, -1))
_PARAMS = {"max_tokens": 3, "temperature": 1.0, "top_k": 5, "top_p": 0.9, "seed": 1, "stop": ["a"]}
_PROMPT = {"chunks": [{"encoded_text": {"tokens": [1, 2, 3]}}]}
_CHAT = {"messages": [{"role": r, "content": "one"} for r in ("user", "assistant")]}
# What works, and is then changed in a place or two.
GOOD: dict[str, Message] = {
    "ForwardBackward": compute("r", 1, _POLICY, ppo={"clip_high_threshold": 1.2}),
    "Forward": trainer_pb2.ForwardRequest(data=[datum()], cross_entropy={}),
    "OptimStep": trainer_pb2.OptimStepRequest(
        adam_params={"learning_rate": 1e-3, "beta1": 0.9, "eps": 1e-8, "grad_clip_norm": 1.0}
    ),
    "CreateTrainingRun": trainer_pb2.CreateTrainingRunRequest(
        request_id="a", lora_config={"rank": 1, "seed": 1, "alpha": 16.0}
    ),
    "Sample": sampler_pb2.SampleRequest(
        prompt=_PROMPT, num_samples=2, sampling_params=_PARAMS, topk_prompt_logprobs=2
    ),
    "StreamSample": sampler_pb2.StreamSampleRequest(
        sample={"prompt": _PROMPT, "sampling_params": _PARAMS},
        request_id="a",
        received=[{"tokens": [1]}],
    ),
    "Tokenize": model_pb2.TokenizeRequest(texts=["one", ""], add_special_tokens=True),
    "Detokenize": model_pb2.DetokenizeRequest(sequences=[{"tokens": [1, 2]}, {"tokens": [3]}]),
    "RenderChat": model_pb2.RenderChatRequest(chats=[_CHAT, _CHAT], renderer="template"),
    "CreateKey": admin_pb2.CreateKeyRequest(
        tenant="a", scopes=["train"], expire_time={"seconds": 2**33, "nanos": 1}, weight=1.0
    ),
    "ComputeLogprobs": sampler_pb2.ComputeLogprobsRequest(prompt=_PROMPT),
}


def methods() -> list[MethodDescriptor]:
    """Every RPC whose request is one message and that ends by itself."""
    found = []
    for name in ("model", "trainer", "sampler", "checkpoint", "admin"):
        module = importlib.import_module(f"mintrpc.v1.{name}_pb2")
        for service in module.DESCRIPTOR.services_by_name.values():
            found += [m for m in service.methods if not m.client_streaming]
    return found


class Fuzz:
    """`runs` are some that exist; their calls get numbers that come next, now and then."""

    def __init__(self, seed: int, runs: list[str]) -> None:
        self._random = random.Random(seed)
        self._runs = runs
        self._next: Counter[str] = Counter()

    def message(self, method: MethodDescriptor) -> Message:
        good = GOOD.get(method.name)
        if good is not None and self._random.random() < 0.7:
            message = type(good)()
            message.CopyFrom(good)
            for _ in range(self._random.randrange(3)):
                self._change(message)
        else:
            message = self._message(GetMessageClass(method.input_type), 0)
        names = method.input_type.fields_by_name
        # What ends a run, or its numbers, comes seldom: the rest would only be not found.
        often = 0.02 if method.name in ("DeleteTrainingRun", "OpenTrainingRun") else 0.9
        if "training_run_id" in names and self._random.random() < often:
            run = self._random.choice(self._runs)
            self._set(message, training_run_id=run)
            if "sequence" in names and self._random.random() < 0.9:
                self._next[run] += 1
                self._set(message, sequence=self._next[run], writer_epoch=1)
                self._set(message, acknowledged_sequence=max(0, self._next[run] - 50))
        return message

    def refused(self, message: Any, details: bytes) -> None:
        """Keeps the numbers of runs without a gap: what has used none up is drawn again."""
        drawn = self._next[message.training_run_id] == message.sequence
        if drawn and next_sequence(details) is None:
            self._next[message.training_run_id] -= 1

    def _change(self, message: Message) -> None:
        """Makes one field of it another, wherever that is."""
        if not (present := message.ListFields()):  # the change before has cleared the only one
            return
        field, value = self._random.choice(present)
        if field.message_type is None or self._random.random() < 0.2:
            message.ClearField(field.name)
            self._fill(message, field, 0)
            return
        if field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is None:
                return
            inner = list(value.values())
        else:
            inner = list(value) if field.is_repeated else [value]
        if inner and (chosen := self._random.choice(inner)).ListFields():
            self._change(chosen)

    def _set(self, message: Message, **values: Any) -> None:
        for name, value in values.items():
            setattr(message, name, value)

    def _message(self, kind: type[Message], depth: int) -> Message:
        message = kind()
        for field in kind.DESCRIPTOR.fields:
            if self._random.random() < (0.3 if depth < 3 else 0.1):
                continue
            if field.name in ("base_model", "model_path") and self._random.random() < 0.9:
                continue
            if field.containing_oneof is not None and self._random.random() < 0.6:
                continue
            self._fill(message, field, depth)
        return message

    def _fill(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            self._fill_map(getattr(message, field.name), field, depth)
        elif field.is_repeated:
            many = 70 if self._random.random() < 0.02 else MOST
            values = [self._value(field, depth) for _ in range(self._random.randrange(many))]
            getattr(message, field.name).extend(values)
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(self._value(field, depth))
        else:
            setattr(message, field.name, self._value(field, depth))

    def _fill_map(self, entries: Any, field: FieldDescriptor, depth: int) -> None:
        assert field.message_type is not None
        value = field.message_type.fields_by_name["value"]
        for _ in range(self._random.randrange(MOST)):
            key = self._random.choice((*TEXTS[:3], *TEXTS[-2:], *NAMES))
            if value.message_type is None:
                entries[key] = self._value(value, depth)
            else:
                entries[key].CopyFrom(self._value(value, depth))

    def _value(self, field: FieldDescriptor, depth: int) -> Any:
        pick, F = self._random.choice, FieldDescriptor
        if field.message_type is not None:
            return self._message(GetMessageClass(field.message_type), depth + 1)
        if field.enum_type is not None:
            return pick([*(value.number for value in field.enum_type.values), 99])
        if field.type in (F.TYPE_DOUBLE, F.TYPE_FLOAT):
            return pick(FLOATS) if self._random.random() < 0.9 else pick(ODD)
        if field.type == F.TYPE_STRING:
            return pick((*TEXTS, f"mint://{pick(self._runs)}/weights/a"))
        if field.type == F.TYPE_BYTES:
            return self._random.randbytes(4 * self._random.randrange(8))
        if field.type == F.TYPE_BOOL:
            return pick((True, False))
        return pick(INTS if field.type == F.TYPE_INT32 else LONG_INTS)


def fuzz(hostile: Hostile, runs: list[str], seed: int, count: int) -> Counter[str]:
    """Sends so many, each with damaged bytes now and then. Raises AssertionError on an answer that
    the contract does not have. Returns how often each code came.
    """
    draw, fuzzing = random.Random(seed), Fuzz(seed, runs)
    codes: Counter[str] = Counter()
    for method, raw, message in _drawn(fuzzing, draw, count):
        service = method.containing_service
        assert service is not None
        path = f"{service.name}/{method.name}"
        sequenced = "sequence" in method.input_type.fields_by_name
        before = _next_number(hostile, message) if sequenced else 0
        if method.server_streaming:
            code, details = _stream(hostile, path, raw), b""
        else:
            key = hostile.root if service.name == "AdminService" else None
            to = draw.choice((hostile.trainer, hostile.sampler)) if service.name in BOTH else None
            code, details = hostile.send(path, raw, key=key, limit_s=LIMIT_S, to=to)
        assert code in LEGAL, f"{path} was answered {code}: {message}"
        if code != Code.OK and sequenced:
            _check_mark(hostile, path, message, details, before)
            fuzzing.refused(message, details)
        codes[code.name] += 1
    return codes


def _check_mark(hostile: Hostile, path: str, message: Any, details: bytes, before: int) -> None:
    """Sent again, a call is refused in the same bytes if its refusal says that it is recorded; if
    not, no number has been used up.
    """
    marked = next_sequence(details)
    if marked is not None:
        assert marked == message.sequence + 1, f"{path} told {marked}: {message}"
        assert hostile.send(path, message)[1] == details, f"{path} changed: {message}"
    elif details:  # a refusal of the server's own
        assert _next_number(hostile, message) == before, f"{path} used a number up: {message}"


def _next_number(hostile: Hostile, message: Any) -> int:
    """Of the run that a call names; 0: there is none."""
    request = trainer_pb2.GetTrainingRunRequest(training_run_id=message.training_run_id)
    code, answer = hostile.send("TrainerService/GetTrainingRun", request)
    if code != Code.OK:
        return 0
    return trainer_pb2.GetTrainingRunResponse.FromString(answer).training_run.next_sequence


def next_sequence(details: bytes) -> int | None:
    """What an error says of its number; None: it is not recorded."""
    info = error_details_pb2.ErrorInfo()
    for detail in status_pb2.Status.FromString(details).details:
        detail.Unpack(info)
    marked = info.metadata.get("next_sequence")
    return None if marked is None else int(marked)


def _drawn(
    fuzzing: Fuzz, draw: random.Random, count: int
) -> Iterator[tuple[MethodDescriptor, bytes, Message]]:
    # Work for minutes, what ends the server, and what an administrator gets: one more engine.
    left_out = ("ExportCheckpoint", "Drain", "AddGroup", "AddReplica")
    known = [method for method in methods() if method.name not in left_out]
    for _ in range(count):
        method = draw.choice(known)
        message = fuzzing.message(method)
        raw = message.SerializeToString()
        if draw.random() < 0.1 and raw and "sequence" not in method.input_type.fields_by_name:
            at = draw.randrange(len(raw))
            raw = raw[:at] + draw.randbytes(1) + raw[at + draw.randrange(2) :]
        yield method, raw, message


def _stream(hostile: Hostile, path: str, raw: bytes) -> Code:
    """What becomes of a stream of which a few messages are read."""
    channel = hostile.sampler if path.startswith("SamplerService/") else hostile.trainer
    call = channel.unary_stream(f"/mintrpc.v1.{path}")(
        raw, timeout=LIMIT_S, metadata=hostile.metadata()
    )
    try:
        for _, _ in zip(range(1), call, strict=False):
            pass
    except grpc.RpcError as error:
        return error.code()
    call.cancel()
    return Code.OK
