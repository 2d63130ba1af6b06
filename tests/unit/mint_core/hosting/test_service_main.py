"""What a service refuses before it starts, and that it starts without torch."""

import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from mint_core.errors import FailedPrecondition
from mint_core.hosting import service_main
from mint_core.hosting.service_config import ServiceConfig
from mint_core.hosting.service_main import check_folders
from mint_core.owned_folder import TRAINER_ROWS, OwnedFolder
from tests.power_loss import filmed

Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        service_main.shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, 90 * 2**20)
    )
    config = ServiceConfig(base_model=str(tmp_path), store=str(tmp_path / "store"))
    with pytest.raises(FailedPrecondition, match="has 90 MiB of free space and needs 100; free"):
        check_folders(config)


def test_rows_of_processes_that_are_gone_make_room_before_a_disk_counts_as_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "store/.rows"
    rows.mkdir(parents=True)
    left, held = rows / "engine-left", OwnedFolder(rows, TRAINER_ROWS)
    left.mkdir()
    (left / "run-1.row").touch()

    def usage(folder: Path) -> Usage:
        return Usage(10**9, 0, 90 * 2**20 if left.exists() else 10**9)

    monkeypatch.setattr(service_main.shutil, "disk_usage", usage)
    check_folders(ServiceConfig(base_model=str(tmp_path), store=str(tmp_path / "store")))

    assert not left.exists()
    assert held.path.exists()
    held.remove()


def test_a_store_that_is_made_at_start_is_there_after_a_loss_of_power(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    with filmed(root) as film:
        check_folders(ServiceConfig(base_model=str(tmp_path), store=str(root / "a" / "b")))
    for why, folder in film.moments[-1].rebuilt(tmp_path / "rebuilt"):
        assert (folder / "a" / "b").is_dir(), why


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        ({"store": "s"}, "s"),
        ({"store": "s3://b/p"}, ".store"),
        ({"store": "s3://b/p", "local_folder": Path("l")}, "l"),
    ],
)
def test_what_stays_on_the_host_has_a_folder(flags: dict[str, Any], folder: str) -> None:
    assert ServiceConfig(base_model="m", **flags).store_folder == Path(folder)


def test_a_local_folder_beside_a_folder_is_refused() -> None:
    with pytest.raises(ValueError, match="lies beside a store that is no folder"):
        ServiceConfig(base_model="m", store="s", local_folder=Path("l"))


def test_a_hub_id_is_left_to_the_engine(tmp_path: Path) -> None:
    for base_model in ("gpt2", "Qwen/Qwen3-0.6B"):
        check_folders(ServiceConfig(base_model=base_model, store=str(tmp_path)))


@pytest.mark.parametrize("base_model", ["./none", "/none", "~/none", "a/b/none", ".models/x"])
def test_what_looks_like_a_path_must_be_a_folder(tmp_path: Path, base_model: str) -> None:
    with pytest.raises(FailedPrecondition, match="is no folder; `make model` makes"):
        check_folders(ServiceConfig(base_model=base_model, store=str(tmp_path)))


@pytest.mark.parametrize(
    "modules",
    [
        "mint_core.hosting.serve, mint_core.access.key_ring",
        "mint_core.hosting.service_main, mint_core.rpc.hosting, mint_core.rpc.model_service",
    ],
)
def test_the_front_imports_neither_torch_nor_transformers(modules: str) -> None:
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()

    assert "mint_core.errors" in loaded
    assert not {"torch", "transformers", "peft", "safetensors.torch"} & set(loaded)
