"""What a service refuses before it starts, and that it starts without torch."""

import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from mint_core import service_main
from mint_core.errors import FailedPrecondition
from mint_core.service_config import ServiceConfig
from mint_core.service_main import check_folders

Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        service_main.shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, 90 * 2**20)
    )
    config = ServiceConfig(base_model=str(tmp_path), store=tmp_path / "store")
    with pytest.raises(FailedPrecondition, match="has 90 MiB of free space and needs 100; free"):
        check_folders(config)


def test_a_hub_id_is_left_to_the_engine(tmp_path: Path) -> None:
    for base_model in ("gpt2", "Qwen/Qwen3-0.6B"):
        check_folders(ServiceConfig(base_model=base_model, store=tmp_path))


@pytest.mark.parametrize("base_model", ["./none", "/none", "~/none", "a/b/none", ".models/x"])
def test_what_looks_like_a_path_must_be_a_folder(tmp_path: Path, base_model: str) -> None:
    with pytest.raises(FailedPrecondition, match="is no folder; `make model` makes"):
        check_folders(ServiceConfig(base_model=base_model, store=tmp_path))


@pytest.mark.parametrize(
    "modules",
    [
        "mint_core.serve, mint_core.access",
        "mint_core.service_main, mint_core.rpc.hosting, mint_core.rpc.model_service",
    ],
)
def test_the_front_imports_neither_torch_nor_transformers(modules: str) -> None:
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()

    assert "mint_core.errors" in loaded
    assert not {"torch", "transformers", "peft", "safetensors.torch"} & set(loaded)
