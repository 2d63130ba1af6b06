"""What users set: the optimizer, the adapter, sampling."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from mint.errors import InvalidInputError, refused
from mint.types._checks import integer, listed, mapping, number, switch, text
from mint.types.model_input import token_list
from mintrpc.v1 import sampler_pb2, types_pb2

DEFAULT_BETAS = (0.9, 0.999)
_SWITCHES = ("train_attn", "train_mlp", "train_unembed")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_NUMBERS = ("temperature", "top_p", "min_p", *_PENALTIES)


@dataclass(frozen=True, slots=True, init=False)
class AdamParams:
    """Hyperparameters of one AdamW step. `betas=(b1, b2)` is short for `beta1=b1, beta2=b2`."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_clip_norm: float

    def __init__(
        self,
        learning_rate: float = 5e-5,
        betas: Sequence[float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        beta1: float | None = None,
        beta2: float | None = None,
        grad_clip_norm: float = 0.0,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(_unknown_adam_option(next(iter(unknown))))
        if betas is not None and (beta1 is not None or beta2 is not None):
            raise refused("betas", "and `beta1` or `beta2` are both given; give one or the other")
        pair = DEFAULT_BETAS if betas is None else listed(betas, "betas", "beta1 and beta2")
        if len(pair) != 2:
            raise refused("betas", f"has {len(pair)} entries; give (beta1, beta2)")
        first, second = pair
        values = {
            "learning_rate": learning_rate,
            "beta1": first if beta1 is None else beta1,
            "beta2": second if beta2 is None else beta2,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_clip_norm": grad_clip_norm,
        }
        for name, value in values.items():
            limit = 1.0 if name in ("beta1", "beta2") else math.inf
            value = number(value, name)
            if not 0.0 <= value < limit:
                wanted = "in [0, 1)" if limit == 1.0 else "finite and at least 0"
                raise InvalidInputError(
                    f"`{name}` is {value}; it must be {wanted}", field=f"adam_params.{name}"
                )
            object.__setattr__(self, name, value)

    @property
    def betas(self) -> tuple[float, float]:
        """`beta1` and `beta2`, as torch.optim.AdamW names them."""
        return self.beta1, self.beta2

    def to_proto(self) -> types_pb2.AdamParams:
        return types_pb2.AdamParams(**dataclasses.asdict(self))


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What an adapter is. `target_modules`, if given, stands instead of the `train_*` switches.

    `train_experts=False` leaves the experts of a base model that has any out of what `train_mlp`
    trains; None leaves them in, which servers refuse that cannot train them.
    """

    rank: int = 16
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True
    _: dataclasses.KW_ONLY
    alpha: float = 32.0
    use_rslora: bool = False
    target_modules: list[str] = dataclasses.field(default_factory=list)
    train_experts: bool | None = None

    def __post_init__(self) -> None:
        names = listed(self.target_modules, "target_modules", "names")
        names = [text(name, f"target_modules[{index}]") for index, name in enumerate(names)]
        object.__setattr__(self, "target_modules", names)
        for name in (*_SWITCHES, "use_rslora"):
            object.__setattr__(self, name, switch(getattr(self, name), name))
        if self.train_experts is not None:
            experts = switch(self.train_experts, "train_experts")
            object.__setattr__(self, "train_experts", experts)
        switches = [getattr(self, name) for name in _SWITCHES]
        if not self.target_modules and not any(switches):
            raise InvalidInputError(
                "`train_attn`, `train_mlp` and `train_unembed` are all false; train at least one",
                field="lora_config",
            )
        if self.target_modules and not (all(switches) and self.train_experts is None):
            raise refused(
                "target_modules",
                "stands instead of `train_attn`, `train_mlp`, `train_unembed` and `train_experts`; "
                "give one or the other",
            )

    def to_proto(self) -> types_pb2.LoraConfig:
        message = types_pb2.LoraConfig(
            rank=integer(self.rank, "rank"),
            seed=None if self.seed is None else integer(self.seed, "seed", bits=64),
            alpha=number(self.alpha, "alpha"),
            use_rslora=self.use_rslora,
            target_modules=self.target_modules,
            train_experts=self.train_experts,
        )
        if not self.target_modules:
            for name in _SWITCHES:
                setattr(message, name, getattr(self, name))
        return message

    @classmethod
    def from_proto(cls, message: types_pb2.LoraConfig) -> Self:
        """What is absent has its default, but for the rank."""
        values: dict[str, Any] = {"rank": message.rank}
        values |= {field.name: value for field, value in message.ListFields()}
        if message.target_modules:
            values |= dict.fromkeys(_SWITCHES, True)
        return cls(**values)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, and what ends a continuation.

    `stop` takes a text, texts, or token ids, `stop_token_ids` token ids; both are added to the
    end-of-sequence tokens. `stop=[]` without ids: only `max_tokens` ends a continuation.
    `max_tokens=None`: the rest of the context.

    `min_p`, 0 to 1: of what top-k and top-p leave, tokens with less than this share of the
    likeliest one's probability are left out. Penalties lower the logits of tokens that have
    occurred: `repetition_penalty` divides positive logits (and multiplies others) of those in the
    prompt or the continuation; `presence_penalty` is subtracted once, and `frequency_penalty` for
    each occurrence, from those in the continuation. None of them changes a logprob.

    `regex`, or `json_schema` (a mapping, or JSON as text), is what the whole text of a continuation
    matches when a token ends it; `max_tokens` and stop texts may end it before. Regular expressions
    are of Rust's syntax, without look-around and back references; what the server cannot follow in
    a schema is refused. Logprobs stay those of all tokens.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_token_ids: Sequence[int] | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    regex: str | None = None
    json_schema: str | Mapping[str, Any] | None = None

    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> "SamplingParams":
        """A copy with the fields of `update` changed."""
        return dataclasses.replace(self, **mapping(update, "update"))

    copy = model_copy

    def to_proto(self) -> sampler_pb2.SamplingParams:
        texts, ids = _stops(self.stop)
        ids += token_list(self.stop_token_ids or [], "stop_token_ids")
        if self.regex is not None and self.json_schema is not None:
            raise refused(
                "regex", "and `json_schema` are both set; a continuation can follow one of them"
            )
        return sampler_pb2.SamplingParams(
            max_tokens=None if self.max_tokens is None else integer(self.max_tokens, "max_tokens"),
            top_k=integer(self.top_k, "top_k"),
            **{name: number(getattr(self, name), name) for name in _NUMBERS},
            seed=None if self.seed is None else integer(self.seed, "seed", bits=64),
            stop=texts,
            stop_token_ids=ids,
            ignore_eos=self.stop is not None and not texts and not ids,
            regex=None if self.regex is None else text(self.regex, "regex"),
            json_schema=None if self.json_schema is None else _schema(self.json_schema),
        )


def _schema(schema: str | Mapping[str, Any]) -> str:
    """A JSON schema as text."""
    if not isinstance(schema, Mapping):
        return text(schema, "json_schema")
    try:
        return json.dumps(dict(schema), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise refused("json_schema", f"is not JSON: {error}") from None


def _stops(stop: str | Sequence[str] | Sequence[int] | None) -> tuple[list[str], list[int]]:
    given: Any = [stop] if isinstance(stop, str) else [] if stop is None else stop
    entries = listed(given, "stop", "texts or of token ids, or one text")
    texts = [entry for entry in entries if isinstance(entry, str)]
    if "" in texts:
        raise refused("stop", "holds an empty text; leave it out")
    if texts and len(texts) < len(entries):
        raise refused("stop", "mixes texts and token ids; give the ids as `stop_token_ids`")
    return texts, [] if texts else token_list(entries, "stop")


def _unknown_adam_option(name: str) -> str:
    if name in ("loss_fn", "loss_fn_config"):
        return f"`{name}` is not an option of the optimizer; give it to forward_backward"
    return (
        f"`{name}` is not an option of AdamParams; it has learning_rate, betas (or beta1 and "
        "beta2), eps, weight_decay, grad_clip_norm"
    )
