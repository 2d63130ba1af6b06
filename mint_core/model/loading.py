"""Loads a base model, puts the LoRA layers in, and has it proved that the packed path computes what
the model does.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    FineGrainedFP8Config,
)

from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import FailedPrecondition
from mint_core.hosting.service_config import ServiceConfig
from mint_core.lora import kernels
from mint_core.lora.float8 import SCALES
from mint_core.lora.groups import LinearShape, complete, read_together, watching
from mint_core.lora.layers import LinearGroup, LoraContext, MultiLoraLinear, install
from mint_core.lora.products import onednn
from mint_core.lora.targets import HEAD, linear_shapes
from mint_core.model import architecture, proof
from mint_core.model.attention import REGISTERED_NAME, register
from mint_core.model.base import LoadedBase, Recomputation
from mint_core.model.base_files import NO_CODE_OF_ITS_OWN, check_memory, find_folder, reading
from mint_core.model.float8.reading import Float8, sample
from mint_core.model.float8.stored import is_fine_grained
from mint_core.model.head import Head
from mint_core.model.inference import make_row_wise, pack
from mint_core.model.loading_progress import told_bar, weights_told
from mint_core.model.mixers.kinds import documents_are_alike, install_mixers, mixing_layers
from mint_core.model.mixers.mixer import MixerContext
from mint_core.model.reproducible import (
    ToldTails,
    ask_for_reproducible_products,
    rows_are_alike,
)
from mint_core.model.routing import Routing, routed_layers
from mint_core.model.tested import TESTED

__all__ = ["LoadedBase", "load_base"]

logger = logging.getLogger(__name__)

FLOAT8 = "float8"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# What libraries raise over files that are missing, torn, or of a kind that they do not know.
_UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


def load_base(
    config: ServiceConfig,
    *,
    inference: bool = False,
    batch_invariant: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> LoadedBase:
    """Loads the base model that a service was told. For inference alone, weights are packed where
    that makes few rows faster. `batch_invariant`: a row's bits must not depend on who shares its
    pass, on a GPU too. `progress` is called now and then while weights come.

    Raises FailedPrecondition, with the remedy, if it cannot be loaded, does not fit, or is of a
    kind that is not supported, or where bits cannot be as they were asked for.
    """
    if not config.trade_bits_for_speed:
        ask_for_reproducible_products()
    torch.set_num_threads(config.threads)
    base_model, place = config.base_model, _device(config.device)
    if place.index is not None:
        torch.cuda.set_device(place)  # Triton launches on the current device
    if place.type == "cuda" and config.own_share:
        torch.cuda.set_per_process_memory_fraction(config.own_share, place)
    if place.type == "cuda" and config.trade_bits_for_speed:
        raise FailedPrecondition(
            "`trade_bits_for_speed` is for a CPU, and this engine's device is a GPU, where bits "
            "depend on neighbours anyhow; leave it out, or give `device` cpu"
        )
    kind = _dtype(config.dtype, place)
    float8 = Float8(kept=kernels.run_on(place)) if config.dtype == FLOAT8 else None
    bar = told_bar(progress)
    folder = find_folder(base_model, config.base_model_revision, bar)
    try:
        with weights_told(bar):
            model, text, eos_token_ids = _read(folder, place, kind, config.own_share, float8)
    except _UNREADABLE as error:
        raise FailedPrecondition(
            f"the base model {base_model!r} cannot be loaded: {architecture.first_line(error)}; "
            "give the folder of a causal LM that transformers "
            f"{transformers.__version__} knows, whole"
        ) from error
    layers, mixing = routed_layers(model), mixing_layers(model)
    architecture.check_architecture(model, text, layers, mixing)
    context_length = architecture.context_length(model)
    shapes = linear_shapes(model, frozen={name for layer in layers for name in layer.frozen})
    with architecture.refusing(model), watching(model) as calls:
        expected = proof.own_logits(model)
    with architecture.refusing(model):
        architecture.check_rows(model, calls, len(expected))
        logit_factor = architecture.logit_factor(model, text, calls, expected)
        groups = complete(shapes, read_together(calls))
    fingerprint, other_fingerprint = _fingerprints(model, float8)
    context = LoraContext()
    context.row_wise = batch_invariant and kernels.run_on(place)
    linears = install(model, context, groups)
    if not inference:
        onednn.keep_few_kernels()
        for together in linears:
            together.choose_library()
    mixer_context = MixerContext()
    mixers = install_mixers(mixing, mixer_context)
    register()
    with architecture.refusing(model):
        model.set_attn_implementation(REGISTERED_NAME)  # type: ignore[operator]
        routing = Routing(model, layers) if layers else None
        if routing is not None and not inference:
            routing.choose_library()
    linear = model.get_submodule(HEAD)
    assert isinstance(linear, MultiLoraLinear)
    base = LoadedBase(
        model=model,
        text=text,
        logit_factor=logit_factor,
        head=Head(linear, getattr(text.config, "final_logit_softcapping", None)),
        context=context,
        recomputation=Recomputation(),
        shapes=shapes,
        groups=groups,
        description=ModelDescription(
            name=config.base_model_name
            or (Path(base_model).resolve().name if folder == Path(base_model) else base_model),
            folder=str(folder),
            context_length=context_length,
            vocabulary_size=linear.out_features,
            max_lora_rank=config.max_lora_rank,
            fingerprint=fingerprint,
            other_fingerprint=other_fingerprint,
            adapters_across_dtypes=config.adapters_across_dtypes,
            dtype=FLOAT8 if float8 else str(kind).removeprefix("torch."),
            device=place.type,
            eos_token_ids=eos_token_ids,
            bitwise_reproducible=False,  # until it is tried
            bits_traded_for_speed=config.trade_bits_for_speed,
            linear_modules=tuple(shapes),
            linear_shapes=tuple((s.out_features, s.in_features) for s in shapes.values()),
            memory_bytes=_memory_bytes(model, linears),
            text_only=architecture.reads_more_than_text(model),
        ),
        device=place,
        dtype=kind,
        routing=routing,
        mixers=mixers,
        mixing=mixer_context,
        by_onednn=onednn.product in {own for own, _ in _products(linears, routing)},
    )
    proof.prove(base, expected)
    if type(model).__name__ not in TESTED:
        logger.warning(
            "%s is not in the table of tested families (docs/models.md): it is served, since a "
            "probe gave its own logits, but gradients, long contexts and exports were never tried",
            type(model).__name__,
        )
    if routing is not None:
        base = proof.with_routing(base, routing)
    proof.take_shortcuts(base)
    if context.row_wise:
        make_row_wise(base)
        return base
    if inference:
        exact = not config.trade_bits_for_speed
        base = replace(base, min_rows=pack(base, linears, exact=exact))
    else:
        base.recomputation.install(model)
    tried = config.threads == 1 and not config.trade_bits_for_speed
    alike = tried and _is_reproducible(base, linears, backward=not inference)
    if batch_invariant and not alike:
        raise FailedPrecondition(
            "`batch_invariant` cannot be kept on this CPU: "
            + ("its libraries round a row by its neighbours" if tried else "it takes `threads` 1")
            + "; leave it out"
        )
    return replace(base, description=replace(base.description, bitwise_reproducible=alike))


def _read(
    folder: Path, device: torch.device, dtype: torch.dtype, share: float, float8: Float8 | None
) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """The model as transformers loads it, without what is not for text, its part that makes hidden
    states, and the tokens that end a sequence.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        names = ", ".join(TOKENIZER_FILES)
        raise FileNotFoundError(f"it has no tokenizer, which is one of {names}")
    check_memory(folder, device, dtype, share, float8=float8 is not None and float8.kept)
    if float8 is not None and not float8.kept:
        logger.info("float8 weights are emulated on a CPU, where they take as much as in float32")
    # Each tensor goes from its file to the device by itself, in the type that is served.
    model, info = read_model(
        folder,
        float8,
        dtype=dtype,
        device_map=device,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
        raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} other tensors")
    parts = {*dict(model.named_children()), *dict(model.base_model.named_children())}
    # They would be left out without a word. Other heads and parts lie beside what is served.
    if extra := sorted(k for k in info["unexpected_keys"] if k.partition(".")[0] in parts):
        raise ValueError(
            f"its config.json has no place for {extra[0]} and {len(extra) - 1} other tensors"
        )
    text = architecture.text_part(model)
    model = model.eval().requires_grad_(False)
    return model, text, _eos_token_ids(model, folder)


def read_model(folder: Path, float8: Float8 | None = None, **options: Any) -> Any:
    """A model that writes text, of the class that transformers has for it: whole, with what reads
    images where that is a part of it; if wanted, with float8 weights.
    """
    config = AutoConfig.from_pretrained(folder, **NO_CODE_OF_ITS_OWN)
    known: Any = AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:  # some have a class for text as well
        known = AutoModelForImageTextToText
    if float8 is not None:
        float8.begin(config)
        options |= {"config": config, "quantization_config": float8}
    elif is_fine_grained(config):  # on some GPUs it would compute in float8 unasked
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    try:
        with reading(folder):
            return known.from_pretrained(folder, **options, **NO_CODE_OF_ITS_OWN)
    except RuntimeError as error:
        if float8 is None or not float8.fault:
            raise
        raise FailedPrecondition(
            f"the base model's weights cannot be read as float8: {float8.fault}; give its files as "
            "they were published"
        ) from error


def _is_reproducible(base: LoadedBase, linears: Sequence[LinearGroup], *, backward: bool) -> bool:
    """On one thread."""
    if base.device.type != "cpu":
        return False
    with ToldTails():
        apart = documents_are_alike(base.mixers.values()) and proof.bits_are_its_own(
            base, backward=backward
        )
    if apart and rows_are_alike(_products(linears, base.routing), base.dtype):
        return True
    logger.warning(
        "this CPU's libraries round few rows, or the last, otherwise than the rest: results are as "
        "exact, but their last bits may change with who shares a pass, and after a crash. No speed "
        "is lost and nothing need be done, but to unset MKL_CBWR where it is set"
    )
    return False


def _products(
    linears: Sequence[LinearGroup], routing: Routing | None
) -> list[tuple[onednn.Product, LinearShape]]:
    """Of all that is not packed, by what and of which shape."""
    products = [
        (own.product, LinearShape(own.group.in_features, width))
        for own in linears
        if len(own.weight)  # or it is packed
        for width in own.group.out_features
    ]
    return products + (routing.products if routing else [])


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
    if dtype in ("auto", FLOAT8):  # what float8 weights multiply is as without them
        # CPUs without AMX or AVX512-bf16 compute bfloat16 some ten times slower than float32.
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise FailedPrecondition(
            f"dtype {dtype!r} is not supported; give auto, float32, bfloat16 or float8"
        )
    return known[dtype]


def _eos_token_ids(model: nn.Module, folder: Path) -> tuple[int, ...]:
    """The union of what generation config and tokenizer say."""
    configured = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).eos_token_id)
    return tuple(sorted(i for i in ids if i is not None))


def _memory_bytes(model: nn.Module, linears: Sequence[LinearGroup]) -> int:
    scales = [group.float8.scales for group in linears if group.float8 is not None]
    return sum(each.nbytes for each in (*model.parameters(), *scales))


def _fingerprints(model: nn.Module, float8: Float8 | None) -> tuple[str, str]:
    """Of the base as it is served, and as it would be in the other kind of type, float8 or not.

    One without float8 is a digest of the architecture and of evenly spaced values of every tensor,
    rounded to bfloat16: the same files give the same on every device and in every such type. One
    with float8 follows from that.
    """
    digest = hashlib.sha256()
    config = architecture.text_config(model)
    for key in (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "rope_parameters",
        "rms_norm_eps",
    ):
        digest.update(f"{key}={getattr(config, key, None)};".encode())
    samples = float8.samples if float8 is not None else {}
    for name, parameter in model.named_parameters():
        if not name.endswith(f".{SCALES}"):
            digest.update(f"{name}:{list(parameter.shape)}".encode())
            digest.update(samples.get(name) or sample(parameter))
    plain = digest.hexdigest()
    other = hashlib.sha256(f"{FLOAT8} {plain}".encode()).hexdigest()
    return (plain, other) if float8 is None else (other, plain)
