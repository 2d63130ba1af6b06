"""Fixtures that every suite may use."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    import mint
    from tests.object_servers import ObjectServer
    from tests.services import Services

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: CPU results are bitwise with one
# Before any test multiplies: MKL is asked once.
from mint_core.model.reproducible import ask_for_reproducible_products

ask_for_reproducible_products()
# Processes that tests start would otherwise compile our sources once more each.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("MINT_WARM_STARTS", "1")  # services start sooner; see tests.warm
# Before any test calls cuBLAS: it is asked once, and `isolated` runs need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton, which transformers imports

# The same examples every time, and no test fails because the machine is busy.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.load_profile("fixed")


def pytest_collection_finish() -> None:
    """Has collections leave alone what was imported: each would take a third of a second. Processes
    that tests start warm have the environment as it is now.
    """
    from tests import warm

    warm.environment()
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or nanobind calls at the end a leak what nobody has looked for


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny seeded Qwen3 with a tied head."""
    from tests.models import tiny_qwen3

    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny seeded Llama with a head of its own."""
    from tests.models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def services(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Services]":
    """Trainer and sampler on the tiny Qwen3, served under the name that the page uses."""
    from tests.services import running_services

    with running_services(qwen3_folder, tmp_path_factory.mktemp("store")) as both:
        yield both


@pytest.fixture
def service(services: "Services") -> "Iterator[mint.ServiceClient]":
    import mint

    with mint.ServiceClient(base_url=services.trainer) as client:
        yield client


@pytest.fixture(scope="module")
def module_service(services: "Services") -> "Iterator[mint.ServiceClient]":
    import mint

    with mint.ServiceClient(base_url=services.trainer) as client:
        yield client


@pytest.fixture(scope="session")
def object_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[ObjectServer]":
    """An S3 server, and its credentials in the environment."""
    from tests.object_servers import running_object_server

    with running_object_server(tmp_path_factory.mktemp("objects")) as server:
        yield server
