"""Base models that cannot be served, and devices that are not there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

from mint_core.errors import FailedPrecondition
from mint_core.model.loading import load_base


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def torn_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def lacking_weights(folder: Path) -> None:
    arrays = load_file(folder / "model.safetensors")
    del arrays["model.norm.weight"]
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_tokenizer, r"it has no tokenizer, which is one of tokenizer\.json"),
        (without_weights, r"no file named model\.safetensors"),
        (torn_weights, r"(incomplete|header|deserializ)"),
        (lacking_weights, r"its weights lack model\.norm\.weight and 0 other tensors"),
        (broken_config, r"JSON|property name"),
        (unknown_architecture, "`unheard_of`"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_refused_with_the_reason(
    qwen3_folder: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    folder = Path(shutil.copytree(qwen3_folder, tmp_path / "model"))
    damage(folder)
    with pytest.raises(FailedPrecondition, match=words) as caught:
        load_base(str(folder))

    assert f"the base model '{folder}' cannot be loaded: " in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("tpu", "is not supported; give cpu, cuda, cuda:N or auto"),
        ("cuda:x", "is not supported"),
        (f"cuda:{torch.cuda.device_count()}", "is not there: torch .* sees [0-9]+ CUDA devices"),
    ],
)
def test_a_device_that_is_not_there_is_refused(qwen3_folder: Path, device: str, words: str) -> None:
    with pytest.raises(FailedPrecondition, match=f"`device` '{device}' {words}"):
        load_base(str(qwen3_folder), device=device)


def test_too_little_memory_is_refused_before_anything_is_loaded(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    """A sparse file stands for weights that no machine holds."""
    folder = Path(shutil.copytree(qwen3_folder, tmp_path / "model"))
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 43)
    with pytest.raises(FailedPrecondition, match=r"needs 8192\.0 GiB but .* GiB are free on cpu"):
        load_base(str(folder), device="cpu")
