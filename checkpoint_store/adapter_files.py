"""The files of a checkpoint: PEFT's two, and the moments for training state."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from checkpoint_store.errors import CheckpointDamaged, WeightsNotFinite
from checkpoint_store.manifest import FileEntry
from checkpoint_store.row_file import Progress
from checkpoint_store.store_files import open_file, problem_of
from mint_core.errors import InvalidRequest
from mint_core.lora.row_layout import Floats
from mint_core.lora.spec import AdapterArrays, AdapterSpec, lora_a_name, lora_b_name

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"

EXP_AVG, EXP_AVG_SQ = "exp_avg.", "exp_avg_sq."  # before the weights' names
# What the files' own metadata say, for whoever has the files alone.
BASE_FINGERPRINT, STEP = "base_fingerprint", "step"


Moments = tuple[AdapterArrays, AdapterArrays]  # first and second, by the weights' names


def write_files(
    folder: Path,
    weights: AdapterArrays,
    moments: Moments | None = None,
    *,
    spec: AdapterSpec,
    base_model: str,
    base_fingerprint: str,
    step: int,  # of the moments
    progress: Progress = lambda: None,
) -> dict[str, FileEntry]:
    """Writes what `PeftModel.from_pretrained` opens, and beside it moments if there are any. All
    files are on disk when this returns, and described.
    """
    config = json.dumps(_peft_config(spec, base_model), indent=2) + "\n"
    about = {BASE_FINGERPRINT: base_fingerprint}
    entries = {
        CONFIG_FILE: _write(folder / CONFIG_FILE, [config.encode()], progress),
        WEIGHTS_FILE: _write(folder / WEIGHTS_FILE, _safetensors(weights, about), progress),
    }
    if moments is not None:
        first, second = moments
        named = {EXP_AVG + name: array for name, array in first.items()}
        named |= {EXP_AVG_SQ + name: array for name, array in second.items()}
        pieces = _safetensors(named, {STEP: str(step)})
        entries[OPTIMIZER_FILE] = _write(folder / OPTIMIZER_FILE, pieces, progress)
    return entries


def read_weights(folder: Path) -> dict[str, Floats]:
    return dict(load_file(folder / WEIGHTS_FILE))


def read_moments(folder: Path) -> Moments:
    """Of training state."""
    arrays = load_file(folder / OPTIMIZER_FILE)
    return with_prefix(arrays, EXP_AVG), with_prefix(arrays, EXP_AVG_SQ)


def check_arrays(path: str, spec: AdapterSpec, arrays: AdapterArrays) -> None:
    """Refuses arrays that are not an adapter of that shape, or not finite."""
    expected = {name for m in spec.modules for name in (lora_a_name(m), lora_b_name(m))}
    if odd := sorted(expected ^ set(arrays)):
        problem = "is missing" if odd[0] in expected else "does not belong to the adapter"
        raise InvalidRequest(
            f"tensor `{odd[0]}` of checkpoint `{path}` {problem}; "
            f"an adapter has A and B of each of its {len(spec.modules)} modules",
            path=path,
            tensor=odd[0],
        )
    for module in spec.modules:
        a, b = arrays[lora_a_name(module)], arrays[lora_b_name(module)]  # [rank, in], [out, rank]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != spec.rank or b.shape[1] != spec.rank:
            raise InvalidRequest(
                f"A and B of `{module}` in checkpoint `{path}` have shapes {a.shape} and "
                f"{b.shape}; rank {spec.rank} needs [{spec.rank}, in] and [out, {spec.rank}]",
                path=path,
                module=module,
            )
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise InvalidRequest(
                f"tensor `{name}` of checkpoint `{path}` is {array.dtype}; adapters are float32",
                path=path,
                tensor=name,
            )
        if not np.isfinite(array).all():
            raise WeightsNotFinite(path, name)


def flush_files(folder: Path) -> dict[str, FileEntry]:
    """Brings every file of the folder to disk and describes it."""
    entries = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            os.fsync(opened.fileno())
        entries[file.name] = FileEntry(file.stat().st_size, digest)
    return entries


def verify_file(path: str, file: Path, entry: FileEntry) -> None:
    """Refuses a file that is not, byte for byte, the one that was published."""
    try:
        with open_file(file) as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            size_bytes = opened.tell()
    except FileNotFoundError:
        raise CheckpointDamaged(path, file.name, "is missing") from None
    except OSError as error:
        raise CheckpointDamaged(path, file.name, problem_of(error)) from None
    if size_bytes != entry.size_bytes:
        problem = f"has {size_bytes} bytes where {entry.size_bytes} were published"
        raise CheckpointDamaged(path, file.name, problem)
    if digest != entry.sha256:
        raise CheckpointDamaged(path, file.name, "does not match its SHA-256")


def _write(file: Path, pieces: Iterable[bytes | memoryview], progress: Progress) -> FileEntry:
    digest = hashlib.sha256()
    with file.open("wb") as opened:
        for piece in pieces:
            digest.update(piece)
            opened.write(piece)
            progress()
        size_bytes = opened.tell()
        opened.flush()
        os.fsync(opened.fileno())
    return FileEntry(size_bytes, digest.hexdigest())


def _safetensors(
    arrays: AdapterArrays, metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """A safetensors file, array by array: the library's writers would hold the interpreter, and all
    of it in memory.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    stop = 0
    for name, array in arrays.items():
        start, stop = stop, stop + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for array in arrays.values():
        yield np.ascontiguousarray(array, "<f4").data.cast("B")


def with_prefix(arrays: Mapping[str, Floats], prefix: str) -> dict[str, Floats]:
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


def _peft_config(spec: AdapterSpec, base_model: str) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "use_rslora": spec.use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        # Full names: a bare `q_proj` would also match modules that were not trained.
        "target_modules": list(spec.modules),
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
