"""The files of a base model: where they are, and whether they fit."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mint_core.errors import FailedPrecondition
from mint_core.model.architecture import first_line

MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
# Neither a folder's Python nor a pickle, which may be as much.
NO_CODE_OF_ITS_OWN = {"trust_remote_code": False, "use_safetensors": True}
_WHEN_WANTED = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers' own
_OF_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
_OUTSIDE_BODY = re.compile(r"embed|wte|lm_head")  # in names of weights
OTHER_FILES = ("consolidated*", "original/*")  # the same weights once more, for other programs


def find_folder(base_model: str, revision: str, bar: type | None = None) -> Path:
    """The folder of a base model, which is one, or what a hub has under that name, by way of its
    local cache. HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT mean what they do elsewhere.
    """
    path = Path(base_model)
    if not path.is_dir():
        path = _from_hub(base_model, revision, bar)
    elif revision:
        raise FailedPrecondition(
            f"`base_model_revision` is {revision!r}, but `base_model` {base_model} is a folder, "
            "which has no revisions; leave it out"
        )
    if not (path / "config.json").is_file():
        raise FailedPrecondition(
            f"the model folder {str(path)!r} has no config.json; is it a model folder?"
        )
    return path


def _from_hub(base_model: str, revision: str, bar: type | None) -> Path:
    try:
        found = snapshot_download(
            base_model,
            revision=revision or None,
            allow_patterns=list(MODEL_FILES),
            ignore_patterns=list(OTHER_FILES),
            tqdm_class=bar,
        )
    except Exception as error:  # the hub's client's, and those of what it stands on
        of = f" of revision {revision!r}" if revision else ""
        raise FailedPrecondition(
            f"the base model {base_model!r}{of} is neither a folder here nor to be had from the "
            f"hub {constants.ENDPOINT}: {_why(error)}"
        ) from None
    return Path(found)


def _why(error: Exception) -> str:
    cache = constants.HF_HUB_CACHE
    match error:
        case HFValidationError():
            return (
                "its models are named OWNER/NAME; give such a name, or a folder, or run "
                "`make model` for the embedded one"
            )
        case GatedRepoError():
            return "it is gated; accept its terms there, and give that account's token in HF_TOKEN"
        case RepositoryNotFoundError():
            return "there is none, or a private one; check the name, or give a token in HF_TOKEN"
        case RevisionNotFoundError():
            return "it has no such revision; check `base_model_revision`"
        case LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return (
                f"HF_HUB_OFFLINE is set, and the cache {cache} lacks it or a part of it; unset "
                "that, or name in HF_HOME the folder of a cache that has it"
            )
        case LocalEntryNotFoundError():
            return (
                f"that is not reached, and the cache {cache} lacks the model or a part of it; give "
                "a folder, or name in HF_HOME the folder of a cache that has it"
            )
    return f"{first_line(error)} ({type(error).__name__})"


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads weights from: one, or those that an index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"its index names {missing[0]} and {len(missing) - 1} other files that are not there"
        )
    return files


def needed_bytes(folder: Path, dtype: torch.dtype | None, *, float8: bool = False) -> int:
    """Memory that the weights take in a type; None: as they are stored. With float8, matrices that
    are neither embeddings nor the head take a byte a number, and a scale for each output.
    """
    total = 0
    for name, tensor in _tensors(folder):
        begin, end = tensor["data_offsets"]
        shape, is_float = tensor["shape"], tensor["dtype"].startswith(("F", "BF"))
        if float8 and is_float and len(shape) == 2 and not _OUTSIDE_BODY.search(name):
            total += prod(shape) + 4 * shape[0]
        else:
            total += prod(shape) * dtype.itemsize if dtype and is_float else end - begin
    return total


def _tensors(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the headers of the files of weights say of each tensor."""
    for path in weight_files(folder):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError(f"the header of {path.name} is incomplete")
            header = json.loads(file.read(size))
        yield from (item for item in header.items() if item[0] != "__metadata__")


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Has transformers read tensors when they are wanted, not ahead of that, where it makes one of
    those of many experts: the parts would all be there beside what is made of them, since memory
    that is freed in small parts does not go back to the system.
    """
    kept = os.environ.get(_WHEN_WANTED)
    if any(_OF_ONE_EXPERT.search(name) for name, _ in _tensors(folder)):
        os.environ[_WHEN_WANTED] = "1"
    try:
        yield
    finally:
        os.environ.pop(_WHEN_WANTED, None)
        if kept is not None:
            os.environ[_WHEN_WANTED] = kept


def free_bytes(device: torch.device, share: float = 0.0) -> int:
    """Memory of a device that nobody has, or as much of it as this process may still take if a
    share of all is its own.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device)
    else:
        memory = psutil.virtual_memory()
        free, total, own = memory.available, memory.total, psutil.Process().memory_info().rss
    return min(free, max(0, int(share * total) - own)) if share else free


def check_memory(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    share: float = 0.0,
    *,
    float8: bool = False,
) -> None:
    """Refuses a model that does not fit, and says by how much, and what would; `dtype` None: as it
    is stored; `float8`: as `needed_bytes` has it.
    """
    needed, free = needed_bytes(folder, dtype, float8=float8), free_bytes(device, share)
    if needed <= free:
        return
    ways = []
    if dtype == torch.float32 and (half := needed_bytes(folder, torch.bfloat16)) <= free:
        ways.append(f"give --dtype bfloat16, in which it needs {_gib(half)}")
    least = needed_bytes(folder, torch.bfloat16, float8=True)
    if device.type == "cuda" and not float8 and least <= free:
        ways.append(f"give --dtype float8, in which it needs {_gib(least)}")
    ways += [
        f"give --device {other}, which has {_gib(free_bytes(other))} free"
        for other in (torch.device("cuda", i) for i in range(torch.cuda.device_count()))
        if other != device and free_bytes(other) >= needed
    ]
    size_bytes = 1 if float8 else dtype.itemsize if dtype else 0
    most = f", of up to {free / size_bytes / 1e9:.1f}e9 parameters" if size_bytes else ""
    more = "give a larger --memory-share" if share else f"free {_gib(needed - free)}"
    ways.append(f"{more}, or serve a smaller model{most}")
    at_hand = "its share" if share else "free"
    raise FailedPrecondition(
        f"the base model needs {_gib(needed)} but {_gib(free)} are {at_hand} on {device}, "
        f"{_gib(needed - free)} too few; {'; or '.join(ways)}"
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
