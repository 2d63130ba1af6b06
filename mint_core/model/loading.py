"""Loads a base model, puts the LoRA layers in, and proves that the packed path computes what the
model does.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mint_core.engine_host.pipe import ModelDescription, RoutedShape
from mint_core.errors import FailedPrecondition
from mint_core.hosting.service_config import ServiceConfig
from mint_core.lora.groups import LinearShape, complete, read_together, watching
from mint_core.lora.layers import LoraContext, MultiLoraLinear, install
from mint_core.lora.segments import MIN_ROWS, Segment
from mint_core.lora.targets import HEAD, linear_shapes
from mint_core.model import architecture
from mint_core.model.attention import REGISTERED_NAME, PackedAttention, register
from mint_core.model.attention_kernels import Scores, causal_attention
from mint_core.model.base import LoadedBase, Recomputation
from mint_core.model.base_files import NO_CODE_OF_ITS_OWN, check_memory, find_folder
from mint_core.model.head import Head, Piece
from mint_core.model.inference import pack
from mint_core.model.loading_progress import told_bar, weights_told
from mint_core.model.mixers.kinds import (
    documents_are_alike,
    install_mixers,
    mixing_layers,
    states_before,
)
from mint_core.model.mixers.mixer import Inputs, Mixer, MixerContext
from mint_core.model.reproducible import ask_for_reproducible_products, rows_are_alike
from mint_core.model.routing import Routing, routed_layers
from mint_core.model.shortcuts import install_shortcuts

__all__ = ["LoadedBase", "load_base"]

logger = logging.getLogger(__name__)

PROBE_TOKENS = 24
SAMPLED_VALUES = 65_536  # per tensor, for the fingerprint
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# What libraries raise over files that are missing, torn, or of a kind that they do not know.
_UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


def load_base(
    config: ServiceConfig,
    *,
    inference: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> LoadedBase:
    """Loads the base model that a service was told. For inference alone, weights are packed where
    that makes few rows cheaper. `progress` is called now and then while weights come.

    Raises FailedPrecondition, with the remedy, if it cannot be loaded, does not fit, or is of a
    kind that is not supported.
    """
    ask_for_reproducible_products()
    torch.set_num_threads(config.threads)
    base_model, place = config.base_model, _device(config.device)
    if place.index is not None:
        torch.cuda.set_device(place)  # Triton launches on the current device
    kind = _dtype(config.dtype, place)
    bar = told_bar(progress)
    folder = find_folder(base_model, config.base_model_revision, bar)
    try:
        with weights_told(bar):
            model, eos_token_ids = _read(folder, place, kind)
    except _UNREADABLE as error:
        raise FailedPrecondition(
            f"the base model {base_model!r} cannot be loaded: {architecture.first_line(error)}; "
            "give the folder of a causal LM that transformers "
            f"{transformers.__version__} knows, whole"
        ) from error
    layers = routed_layers(model)
    shapes = linear_shapes(model, frozen=[layer.router for layer in layers])
    _check_shapes(base_model, shapes)
    mixing = mixing_layers(model)
    architecture.check_architecture(model, layers, mixing)
    with architecture.refusing(model), watching(model) as calls:
        expected = _own_logits(model)
    groups = complete(shapes, read_together(calls))
    fingerprint = _fingerprint(model)
    context = LoraContext()
    linears = install(model, context, groups)
    mixer_context = MixerContext()
    mixers = install_mixers(mixing, mixer_context)
    register()
    with architecture.refusing(model):
        model.set_attn_implementation(REGISTERED_NAME)  # type: ignore[operator]
        routing = Routing(model, layers) if layers else None
    products = [*shapes.values(), *(routing.shapes if routing else ())]
    linear = model.get_submodule(HEAD)
    assert isinstance(linear, MultiLoraLinear)
    base = LoadedBase(
        model=model,
        head=Head(linear, getattr(model.config, "final_logit_softcapping", None)),
        context=context,
        recomputation=Recomputation(),
        shapes=shapes,
        groups=groups,
        description=ModelDescription(
            name=config.base_model_name
            or (Path(base_model).resolve().name if folder == Path(base_model) else base_model),
            folder=str(folder),
            context_length=architecture.context_length(model),
            vocabulary_size=linear.out_features,
            max_lora_rank=config.max_lora_rank,
            fingerprint=fingerprint,
            dtype=str(kind).removeprefix("torch."),
            device=place.type,
            eos_token_ids=eos_token_ids,
            bitwise_reproducible=_is_reproducible(place, config.threads, products, mixers),
            linear_modules=tuple(shapes),
            linear_shapes=tuple((s.out_features, s.in_features) for s in shapes.values()),
            memory_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        ),
        device=place,
        dtype=kind,
        routing=routing,
        mixers=mixers,
        mixing=mixer_context,
    )
    _check_packed_path(base, expected)
    if routing is not None:
        base = _with_routing(base, routing)
    _take_shortcuts(base)
    if inference:
        return replace(base, min_rows=pack(base, linears))
    base.recomputation.install(model)
    return base


def _read(
    folder: Path, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, tuple[int, ...]]:
    """The model as transformers loads it, and the tokens that end a sequence."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        names = ", ".join(TOKENIZER_FILES)
        raise FileNotFoundError(f"it has no tokenizer, which is one of {names}")
    check_memory(folder, device, dtype)
    # Each tensor goes from its file to the device by itself, in the type that is served.
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map=device,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        **NO_CODE_OF_ITS_OWN,
    )
    if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
        raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} other tensors")
    parts = {*dict(model.named_children()), *dict(model.base_model.named_children())}
    # They would be left out without a word. Other heads and parts lie beside what is served.
    if extra := sorted(k for k in info["unexpected_keys"] if k.partition(".")[0] in parts):
        raise ValueError(
            f"its config.json has no place for {extra[0]} and {len(extra) - 1} other tensors"
        )
    model = model.eval().requires_grad_(False)
    return model, _eos_token_ids(model, folder)


def _is_reproducible(
    device: torch.device,
    threads: int,
    shapes: Sequence[LinearShape],
    mixers: Mapping[int, Mixer],
) -> bool:
    if device.type != "cpu" or threads > 1:
        return False
    if rows_are_alike(shapes) and documents_are_alike(mixers.values()):
        return True
    logger.warning(
        "this CPU's library rounds products of few rows otherwise than those of many: results are "
        "as exact, but their last bits may change with who shares a pass, and after a crash. No "
        "speed is lost and nothing need be done, but to unset MKL_CBWR where it is set"
    )
    return False


def _device(device: str) -> torch.device:
    count = torch.cuda.device_count()
    if device == "auto":
        return torch.device("cuda" if count else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise FailedPrecondition(
            f"`device` {device!r} is not supported; give cpu, cuda, cuda:N or auto"
        )
    if device != "cpu" and int(match[1] or 0) >= count:
        raise FailedPrecondition(
            f"`device` {device!r} is not there: torch {torch.__version__} sees {count} CUDA "
            "devices; give another, or auto, or install a build of torch for this machine's"
        )
    return torch.device(device)


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        # CPUs without AMX or AVX512-bf16 compute bfloat16 some ten times slower than float32.
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise FailedPrecondition(
            f"dtype {dtype!r} is not supported; give auto, float32 or bfloat16"
        )
    return known[dtype]


def _check_shapes(base_model: str, shapes: dict[str, LinearShape]) -> None:
    if HEAD not in shapes or len(shapes) < 2:
        raise FailedPrecondition(
            f"the base model {base_model!r} has no linear layers that LoRA can train, or no "
            f"`{HEAD}`; "
            "serve a causal LM whose layers are nn.Linear"
        )


def _eos_token_ids(model: nn.Module, folder: Path) -> tuple[int, ...]:
    """The union of what generation config and tokenizer say."""
    configured = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).eos_token_id)
    return tuple(sorted(i for i in ids if i is not None))


def _fingerprint(model: nn.Module) -> str:
    """Digest of the architecture and of evenly spaced values of every tensor, rounded to bfloat16.

    The same files give the same digest on every device and in every dtype.
    """
    digest = hashlib.sha256()
    for key in (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "rope_parameters",
        "rms_norm_eps",
    ):
        digest.update(f"{key}={getattr(model.config, key, None)};".encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)
        stride = max(1, values.numel() // SAMPLED_VALUES)
        sample = values[::stride].to(torch.bfloat16)
        digest.update(f"{name}:{list(parameter.shape)}".encode())
        digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def _probe(model: nn.Module) -> Tensor:  # [tokens]
    vocabulary_size: int = model.config.vocab_size  # type: ignore[union-attr,assignment]
    device = next(model.parameters()).device
    return (torch.arange(PROBE_TOKENS, device=device) * 7919 + 11) % vocabulary_size


@torch.no_grad()
def _own_logits(model: nn.Module) -> Tensor:  # [tokens, vocabulary]
    logits: Tensor = model(input_ids=_probe(model)[None], use_cache=False).logits[0]
    return logits.float()


class _Probe(PackedAttention):
    """Notes what window each layer asks for, and what a cache would keep of it."""

    def __init__(self, bounds: list[int]) -> None:
        super().__init__(bounds)
        self.scores: dict[int, Scores] = {}
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, of the whole stream
        self.mixed: dict[int, Inputs] = {}  # of layers with state, of the whole stream
        self.calls: Counter[int] = Counter()  # of each layer's attention, or mixer

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        self.scores[layer_index] = scores
        self.kept[layer_index] = key, value
        self.calls[layer_index] += 1
        return super().attend(layer_index, query, key, value, scores)

    def mix(self, layer_index: int, mixer: Mixer, inputs: Inputs) -> Tensor:
        self.mixed[layer_index] = inputs
        self.calls[layer_index] += 1
        return super().mix(layer_index, mixer, inputs)


class _Decoding:
    """Each row is a token of the probe, beside what was kept of those before it."""

    def __init__(self, probe: _Probe, places: Sequence[int]) -> None:
        self._kept, self._mixed = probe.kept, probe.mixed
        self._places = places

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        outputs = []
        for row, place in enumerate(self._places):
            own = slice(row, row + 1)
            keys, values = (
                torch.cat([kept[:, :place], new[:, own]], dim=1)
                for kept, new in zip(self._kept[layer_index], (key, value), strict=True)
            )
            outputs.append(causal_attention(query[:, own], keys, values, scores))
        return torch.cat(outputs, dim=1)

    def mix(self, layer_index: int, mixer: Mixer, inputs: Inputs) -> Tensor:
        states = states_before(mixer, self._mixed[layer_index], self._places)
        return mixer.step(inputs, states)[0]


@torch.no_grad()
def _check_packed_path(base: LoadedBase, expected: Tensor) -> None:
    """Refuses a model whose own logits the packed path does not reproduce: two documents side by
    side, and tokens that are decoded from what is kept of the first.
    """
    tokens = _probe(base.model)
    n = len(tokens)
    positions = torch.arange(n, device=base.device)
    whole = Segment(0, 2 * n)
    probe = _Probe([0, n, 2 * n])
    with architecture.refusing(base.model):
        hidden = base.hidden(tokens.repeat(2), positions.repeat(2), (whole,), probe)
    architecture.check_layers(base.model, probe.calls)
    architecture.check_windows(base.model, {i: s.sliding_window for i, s in probe.scores.items()})
    _compare(base, "packed", base.head.logits(hidden, [Piece(whole, positions + n)]), expected)
    places = positions[n // MIN_ROWS - 1 :: n // MIN_ROWS]
    rows = Segment(0, len(places))
    hidden = base.hidden(tokens[places], places, (rows,), _Decoding(probe, places.tolist()))
    decoded = base.head.logits(hidden, [Piece(rows, positions[rows.rows])])
    _compare(base, "decoded", decoded, expected[places])


@torch.no_grad()
def _with_routing(base: LoadedBase, routing: Routing) -> LoadedBase:
    """The base with the shape of its routing in its description. Refuses experts that do not go
    through our function, and routers that cannot be told where tokens go.
    """
    tokens = _probe(base.model)
    n = len(tokens)
    places, whole = torch.arange(n, device=base.device), (Segment(0, n),)
    base.hidden(tokens, places, whole, PackedAttention([0, n]))
    architecture.check_experts(base.model, routing)
    told = (torch.stack(routing.chosen, 1) + 1) % routing.experts  # others than its own
    base.hidden(tokens, places, whole, PackedAttention([0, n]), told)
    if not torch.equal(torch.stack(routing.chosen, 1), told):
        raise architecture.unsupported(base.model, "its routers cannot be told where tokens go")
    shape = RoutedShape(len(routing.layers), routing.experts, routing.experts_per_token)
    return replace(base, description=replace(base.description, routed=shape))


def _compare(base: LoadedBase, kind: str, logits: Tensor, expected: Tensor) -> None:
    difference = (logits - expected).abs().max() / expected.abs().max().clamp(min=1.0)
    if not difference < (1e-4 if base.dtype == torch.float32 else 0.1):
        raise architecture.unsupported(
            base.model, f"{kind} logits differ from its own by {difference.item():.1e}"
        )
    logger.info("%s logits agree with the model's own to %.1e", kind, difference.item())


@torch.no_grad()
def _take_shortcuts(base: LoadedBase) -> None:
    """Lets modules compute in direct forms where those give the same: at the context's end, where
    also what depends on the position shows.
    """
    tokens = _probe(base.model)
    n = len(tokens)
    probe = _Probe([0, n])
    positions = torch.arange(n, device=base.device) + architecture.context_length(base.model) - n
    with watching(base.model) as calls:
        base.hidden(tokens, positions, (Segment(0, n),), probe)
    install_shortcuts(calls, probe.scores)
